"""Injection: the input e (the prelude's output) enters each recurrence."""

from __future__ import annotations

import math

import torch
from torch import nn


class Injection(nn.Module):
    """inject(s, e), by `kind`:

    none: s. add: s + e. linear: W [s, e] with W [D, 2D], no bias.
    gated: g s + (1 - g) e with g = sigmoid(W [s, e] + b), one gate for each channel.
    decayed: a s + (1 - a) W e with a = sigmoid(decay), one factor for each channel, and W [D, D].
    diagonal: exp(-dt exp(log_rate)) s + dt W e with dt = softplus(step), both for each channel, and W [D, D].

    `linear` is the adapter of retrofitted recurrence (arXiv 2511.07384), whose authors leave W at random. `diagonal` is
    that of Parcae (arXiv 2604.12946) in its own parameters, and `decayed` the same by its factor a: their W is
    dt W / (1 - a). As a < 1, the state has a bound for all R where the core's layers norm their inputs.

    All start so that one recurrence equals the source, and later recurrences use the state: `linear` and `decayed` with
    `preserving_weight`, and `decay` 0; `gated` with zeros. All gates and factors are one half, and s_0 = e gives e
    exactly; with `diagonal`, up to rounding.
    """

    def __init__(self, kind: str, width: int):
        super().__init__()
        self.kind = kind
        if kind in ("linear", "gated"):
            self.weight = nn.Parameter(torch.empty(width, 2 * width))
        if kind == "gated":
            self.bias = nn.Parameter(torch.empty(width))
        if kind == "decayed":
            self.weight = nn.Parameter(torch.empty(width, width))
            self.decay = nn.Parameter(torch.empty(width))
        if kind == "diagonal":
            self.weight = nn.Parameter(torch.empty(width, width))
            self.log_rate, self.step = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    @staticmethod
    def preserving_weight(kind: str, width: int, state_init: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W with inject(s_0, e) = e exactly, and a share of the state. Small `normal` states perturb it.

        linear [D, 2D]: for s_0 = e the mean of both, [I/2, I/2]; for s_0 = 0 the sum, [I, I].   decayed [D, D], with
        a = 1/2: I for s_0 = e, 2 I for s_0 = 0.   diagonal [D, D], with dt = ln 2: I / (2 ln 2), or twice that.
        """
        eye = torch.eye(width, dtype=dtype)
        if kind == "diagonal":
            return eye / math.log(4 if state_init == "input" else 2)
        if kind == "decayed":
            return eye * (1.0 if state_init == "input" else 2.0)
        return torch.cat([eye, eye], dim=1) * (0.5 if state_init == "input" else 1.0)

    def forward(self, s: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """s, e [..., D] -> [..., D]."""
        if self.kind == "none":
            return s
        if self.kind == "add":
            return s + e
        if self.kind == "decayed":
            kept = torch.sigmoid(self.decay)
            return kept * s + (1 - kept) * nn.functional.linear(e, self.weight)
        if self.kind == "diagonal":
            dt = nn.functional.softplus(self.step)
            return torch.exp(-dt * self.log_rate.exp()) * s + dt * nn.functional.linear(e, self.weight)
        both = torch.cat([s, e], dim=-1)
        if self.kind == "linear":
            return nn.functional.linear(both, self.weight)
        gate = torch.sigmoid(nn.functional.linear(both, self.weight, self.bias))
        return gate * s + (1 - gate) * e
