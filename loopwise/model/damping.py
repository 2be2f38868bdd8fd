"""Damped recurrence: the state takes a share of the step that a recurrence would make.

    s_r = s_{r-1} + g_r (core(inject(s_{r-1}, e)) - s_{r-1})

Sources: damped repetition of a block of a pretrained model, without training, arXiv 2605.23872; the selective gate of
LoopUS, arXiv 2605.11011.
Shapes: D width, N rows of a lane engine; [..., D] any states.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear, softplus

from .configuration_recurrent_depth import INVERSE_DEPTH, LEARNED, SELECTIVE


def interpolate(before: torch.Tensor, after: torch.Tensor, share: float | torch.Tensor) -> torch.Tensor:
    """before + share (after - before) [..., D], in the type of `after`. A share of 1 gives `after` exactly.

    It is written as a difference from `after`: so a learned share that is 1 still gets its gradient.
    """
    return (after + (share - 1) * (after - before)).to(after.dtype)


class Damping(nn.Module):
    """The share g_r, by `kind` (the config's `recurrence_damping`):

    1: no damping, and no arithmetic.   a number below 1: that number.   learned: sigmoid(w) for each channel, with
    w [D] = 0 at the start. For both the first recurrence has g_1 = 1, so that one recurrence stays the source's.
    1/R: all recurrences of a call of R have g = 1/R, as the steps of Euler's method have.
    selective: g = exp(-softplus(up down step + bias) exp(log_rate)) of every token and channel, with the step
    core(..) - s_{r-1} [D], down [D/16, D] and up [D, D/16]. It damps all recurrences, and starts at one half.
    """

    def __init__(self, kind: float | str, width: int):
        super().__init__()
        self.kind = kind
        if kind == LEARNED:
            self.weight = nn.Parameter(torch.zeros(width))
        if kind == SELECTIVE:
            rank = -(-width // 16)
            self.down, self.up = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.empty(width, rank))
            self.bias, self.log_rate = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(
        self,
        before: torch.Tensor,
        after: torch.Tensor,
        started: bool | torch.Tensor,
        recurrences: int | torch.Tensor,
    ) -> torch.Tensor:
        """The damped state [..., D], from the states `before` and `after` a recurrence.

        started: a recurrence has run before this one.   recurrences: R of the call. Both are tensors [N] for rows that
        differ in them.
        """
        if self.kind == 1:
            return after
        if self.kind == INVERSE_DEPTH:
            if isinstance(recurrences, torch.Tensor):  # padding rows have R = 0
                return interpolate(before, after, recurrences.clamp(min=1).float().reciprocal()[..., None])
            return after if recurrences == 1 else interpolate(before, after, 1 / recurrences)
        if self.kind == SELECTIVE:
            rate = softplus(linear(linear(after - before, self.down), self.up, self.bias).float())
            return interpolate(before, after, torch.exp(-rate * self.log_rate.float().exp()))
        if isinstance(started, torch.Tensor):
            return interpolate(before, after, torch.where(started[..., None], self._share(), 1.0))
        if started:
            return interpolate(before, after, self._share())
        alone = isinstance(recurrences, torch.Tensor) or recurrences == 1  # this recurrence may be the last one
        if self.kind == LEARNED and alone and torch.is_grad_enabled():
            # Every parameter takes part in every step: data-parallel training waits for its gradient.
            return (after + 0 * self.weight).to(after.dtype)
        return after

    def _share(self) -> float | torch.Tensor:
        """g of the recurrences after the first: one number, or [D]."""
        return torch.sigmoid(self.weight.float()) if self.kind == LEARNED else float(self.kind)
