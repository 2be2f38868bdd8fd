"""Injection: how the input e (the prelude's output) enters each recurrence."""

from __future__ import annotations

import torch
from torch import nn


class Injection(nn.Module):
    """inject(s, e): `none` gives s, `add` gives s + e, `linear` gives W [s, e] with W [D, 2D], no bias, and `gated`
    gives g s + (1 - g) e with g = sigmoid(W [s, e] + b), for every channel its own.

    `linear` is the adapter of retrofitted recurrence (arXiv 2511.07384). The authors leave W at random; here both start
    so that one recurrence computes what the source computes, and so that later recurrences use the state: `linear`
    with `preserving_weight`, `gated` with zeros, so that every gate is one half and s_0 = e gives e exactly.
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
        both = torch.cat([s, e], dim=-1)
        if self.kind == "linear":
            return nn.functional.linear(both, self.weight)
        gate = torch.sigmoid(nn.functional.linear(both, self.weight, self.bias))
        return gate * s + (1 - gate) * e
