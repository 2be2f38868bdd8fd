"""The steps at both ends of the recurrence: a norm of its input e, and a linear map of its last state."""

from __future__ import annotations

import torch
from torch import nn


class Ends(nn.Module):
    """`prelude_norm` and `state_projection` of the config, as Parcae has them (arXiv 2604.12946). Shapes: D width.

    norm [D]: weight of an RMS norm of e.   projection [D, D]: W in coda(W s_R), the identity at the start.
    """

    def __init__(self, norm: bool, projection: bool, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.norm = nn.Parameter(torch.empty(width)) if norm else None
        self.projection = nn.Parameter(torch.empty(width, width)) if projection else None

    def enter(self, e: torch.Tensor) -> torch.Tensor:
        """The input of the recurrence [.., D] for the prelude's output e [.., D]."""
        return e if self.norm is None else self(e, "norm")

    def leave(self, s: torch.Tensor) -> torch.Tensor:
        """The coda's input [.., D] for the last state s [.., D]."""
        return s if self.projection is None else self(s, "projection")

    def forward(self, x: torch.Tensor, step: str) -> torch.Tensor:
        """x [.., D] after the `step` of that name. Parameters that a `device_map` offloads are loaded here alone."""
        if step == "norm":
            assert self.norm is not None
            return nn.functional.rms_norm(x, self.norm.shape, self.norm, self.eps)
        assert self.projection is not None
        return nn.functional.linear(x, self.projection)
