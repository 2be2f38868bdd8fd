"""Injection: how the input e (the prelude's output) enters each recurrence."""

from __future__ import annotations

import torch
from torch import nn


class Injection(nn.Module):
    """inject(s, e): `none` gives s, `add` gives s + e, `linear` gives W [s, e] with W [D, 2D], no bias.

    `linear` is the adapter of retrofitted recurrence (arXiv 2511.07384). The authors leave W at random; here it starts
    so that one recurrence computes what the source computes, and so that later recurrences use the state.
    """

    def __init__(self, kind: str, width: int):
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.weight = nn.Parameter(torch.empty(width, 2 * width))

    @staticmethod
    def preserving_weight(width: int, state_init: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W [D, 2D] with inject(s_0, e) = e exactly, that also passes the state on.

        s_0 = e: the mean of both, [I/2, I/2]. s_0 = 0: the sum, [I, I]; small `normal` states perturb that.
        """
        eye = torch.eye(width, dtype=dtype)
        return torch.cat([eye, eye], dim=1) * (0.5 if state_init == "input" else 1.0)

    def forward(self, s: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """s, e [..., D] -> [..., D]."""
        if self.kind == "none":
            return s
        if self.kind == "add":
            return s + e
        return nn.functional.linear(torch.cat([s, e], dim=-1), self.weight)
