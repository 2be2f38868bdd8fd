"""Fixtures that tests of the server share."""

from __future__ import annotations

import pytest

from tests.helpers.serve_tiny import GROUPED, RETROFIT, save, source_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model's directory, and the model."""
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    return folder, save(folder, source_config("llama", **GROUPED), **RETROFIT)
