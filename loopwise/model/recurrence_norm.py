"""The norm of `recurrence_norm` at its three places: before a recurrence, after it, and after the last one.

`kind` is the config's `recurrence_norm`. Shapes: s [..., D], a state of width D; started [...].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Norm = Callable[[torch.Tensor], torch.Tensor]


def norm_before(kind: str, s: torch.Tensor, norm: Norm | Any, started: bool | torch.Tensor) -> torch.Tensor:
    """The state that a recurrence starts from. `between` (Ouro) norms it, unless it is the initial state.

    started: True where a recurrence has run already; a tensor for rows that differ in that.
    """
    if kind != "between":
        return s
    if isinstance(started, bool):
        return norm(s) if started else s
    return torch.where(started[..., None], norm(s), s)


def norm_after(kind: str, s: torch.Tensor, norm: Norm | Any) -> torch.Tensor:
    """The state that a recurrence leaves. `each` norms it."""
    return norm(s) if kind == "each" else s


def norm_at_end(kind: str, s: torch.Tensor, norm: Norm | Any) -> torch.Tensor:
    """The state that the coda reads. `last` (Huginn) norms it."""
    return norm(s) if kind == "last" else s
