"""Injection: the input e (the prelude's output) enters each recurrence."""

from __future__ import annotations

import torch
from torch import nn


class Injection(nn.Module):
    """inject(s, e), by `kind`:

    none: s. add: s + e. linear: W [s, e] with W [D, 2D], no bias.
    gated: g s + (1 - g) e with g = sigmoid(W [s, e] + b), one gate for each channel.

    `linear` is the adapter of retrofitted recurrence (arXiv 2511.07384), whose authors leave W at random. Here both
    start so that one recurrence equals the source, and later recurrences use the state: `linear` with
    `preserving_weight`; `gated` with zeros, where every gate is one half and s_0 = e gives e exactly.
    """

    def __init__(self, kind: str, width: int):
        super().__init__()
        self.kind = kind
        if kind in ("linear", "gated"):
            self.weight = nn.Parameter(torch.empty(width, 2 * width))
        if kind == "gated":
            self.bias = nn.Parameter(torch.empty(width))

    @staticmethod
    def preserving_weight(width: int, state_init: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W [D, 2D] with inject(s_0, e) = e exactly, and a share of the state.

        For s_0 = e the mean of both, [I/2, I/2]; for s_0 = 0 the sum, [I, I], which small `normal` states perturb.
        """
        eye = torch.eye(width, dtype=dtype)
        return torch.cat([eye, eye], dim=1) * (0.5 if state_init == "input" else 1.0)

    def forward(self, s: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """s, e [..., D] -> [..., D]."""
        if self.kind == "none":
            return s
        if self.kind == "add":
            return s + e
        both = torch.cat([s, e], dim=-1)
        if self.kind == "linear":
            return nn.functional.linear(both, self.weight)
        gate = torch.sigmoid(nn.functional.linear(both, self.weight, self.bias))
        return gate * s + (1 - gate) * e
