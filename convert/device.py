"""Devices on which a conversion computes."""

from __future__ import annotations

import torch

from ..errors import UserError


def named_device(name: str) -> torch.device:
    """The device of that name. Raises UserError where torch finds none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device=cuda: torch {torch.__version__} finds no CUDA device here; use device=cpu, the default"
        )
    return torch.device(name)
