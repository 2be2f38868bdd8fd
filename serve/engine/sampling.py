"""Sampling by Gumbel-max with counter-based noise: a token depends on its logits and on (seed, choice, position) alone.

So a sample is the same whatever else is in the batch, and whichever decoder found its logits.
"""

from __future__ import annotations

import torch

from ...model.initial_state import counter_bits


def waiting_times(seed: torch.Tensor, choice: torch.Tensor, position: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Exponential noise [n, V] as a function of (seed, choice, position) [n] and token; argmax p / noise samples p.

    float64, from 53 bits, so that the tail of a large vocabulary is not cut.
    """
    bits = counter_bits(seed, choice, position, vocabulary)
    return -torch.log1p(-(((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) / (1 << 53))


def sample(
    logits: torch.Tensor,
    best: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Tokens [n] for logits [n, V], of which `best` [n] are the likeliest; temperature 0 takes these, top_k 0, top_p 1
    and min_p 0 cut nothing (each [n]). top_p is a share of what the other two leave.

    `noise` [n, V]: see `waiting_times`.
    """
    scaled = logits.double() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    p = scaled.softmax(-1)
    ordered, order = p.sort(-1, descending=True)
    rank = torch.arange(p.shape[-1], device=p.device)
    keep = rank < torch.where(top_k > 0, top_k, p.shape[-1])[:, None]
    keep &= ordered >= min_p[:, None] * ordered[:, :1]
    ordered = torch.where(keep, ordered, 0.0)
    keep &= ordered.cumsum(-1) - ordered < top_p[:, None] * ordered.sum(-1, keepdim=True)
    kept = torch.zeros_like(p).scatter(-1, order, torch.where(keep, ordered, 0.0))
    return torch.where(temperature > 0, (kept / noise).argmax(-1), best)
