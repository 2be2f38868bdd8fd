"""Compiled functions for any number of lanes."""

from __future__ import annotations

import pytest
import torch

from loopwise.serve.engine.compile import compiled
from tests.helpers.engines import build, check, requests


@pytest.mark.parametrize(
    ("policy", "width"), [pytest.param(*case, marks=pytest.mark.slow) for case in (("per-depth", 8), ("single", 3))]
)
def test_a_compiled_tick_narrower_than_the_lanes(policy, width):
    check(build(), policy, *requests(7, 16, policy, ["fixed", "latent-diff"]), compile=True, max_lanes=width)


def test_a_call_with_autograd_on_is_refused():
    with pytest.raises(AssertionError, match="autograd"):
        compiled(lambda owner, x: x + 1)(None, torch.zeros(3))
