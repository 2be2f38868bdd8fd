"""Quiet libraries: Loopwise's own lines name all that matters."""

from __future__ import annotations

import os


def quiet() -> None:
    """Silence transformers' notes and bars on every load, and the warning of DeepSpeed that it sees no GPU."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
