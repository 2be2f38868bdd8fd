"""The exit gate: the probability that a position leaves after a recurrence. Shapes: D width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class ExitGate(nn.Linear):
    """Logits w norm(s) + b of the probability to exit, for states s. The norm, by `kind` (`exit_gate_norm`):

    final: the source's final norm (Ouro, arXiv 2510.25741).   own: a LayerNorm (LoopUS, arXiv 2605.11011).
    """

    def __init__(self, width: int, kind: str):
        super().__init__(width, 1)
        self.kind = kind
        if kind == "own":
            self.norm = nn.LayerNorm(width)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, s: torch.Tensor, final_norm: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Logits [..] for states s [.., D]. final_norm: the source's."""
        return super().forward(self.norm(s) if self.kind == "own" else final_norm(s)).squeeze(-1)
