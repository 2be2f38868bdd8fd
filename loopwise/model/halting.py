"""Adaptive computation time (arXiv 1603.08983), token by token as in Universal Transformers (arXiv 1807.03819)."""

from __future__ import annotations

import torch


def halting_weights(logits: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [R, B, T] of the states s_1 .. s_R, which sum to one, and the ponder cost N + remainder [B, T].

    logits [R, B, T] of the halting gate: h_r is their sigmoid. A token halts at the first N where h_1 + .. + h_N
    reaches 1 - epsilon, or at R; its weights are h_1 .. h_{N-1} and the remainder 1 - (h_1 + .. + h_{N-1}), then zero.
    Gradients of the cost pass through the remainder alone, as in the paper.
    """
    h = torch.sigmoid(logits.float())
    reached = h.cumsum(0)
    before = torch.cat([torch.zeros_like(h[:1]), reached[:-1]])
    running = before < 1 - epsilon  # the token had not halted before recurrence r
    running[0] = True
    ends = running & ((reached >= 1 - epsilon) | _last(h))
    weights = torch.where(ends, 1 - before, torch.where(running, h, 0))
    return weights, running.sum(0) + torch.where(ends, 1 - before, 0).sum(0)


def _last(h: torch.Tensor) -> torch.Tensor:
    """True [R, 1, 1] for the last of R recurrences."""
    return (torch.arange(h.shape[0], device=h.device) == h.shape[0] - 1)[:, None, None]
