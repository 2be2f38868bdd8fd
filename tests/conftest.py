"""Every test runs offline and on one thread: equality must not depend on how sums are split."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import transformers
from hypothesis import settings

pytest.register_assert_rewrite("tests.helpers")  # failures inside helpers show both sides, too
settings.register_profile("untimed", deadline=None)  # a busy machine fails no test
settings.load_profile("untimed")
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _plugins_of_vllm():
    """A command that a test runs in this process names our endpoint plugin: other tests' processes do not load it."""
    yield
    os.environ.pop("VLLM_PLUGINS", None)
