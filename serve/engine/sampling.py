"""Sampling by Gumbel-max with counter-based noise: a token depends on its logits and on (seed, choice, position) alone.

So a sample is the same whatever else is in the batch, and whichever decoder found its logits.
"""

from __future__ import annotations

from collections import Counter

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
    cut: bool = True,
) -> torch.Tensor:
    """Tokens [n] for logits [n, V], of which `best` [n] are the likeliest; temperature 0 takes these, top_k 0, top_p 1
    and min_p 0 cut nothing (each [n]). top_p is a share of what the other two leave. `cut`: whether any row cuts.

    `noise` [n, V]: see `waiting_times`.
    """
    less = logits.double() - logits.amax(-1, keepdim=True)  # first, as a small temperature takes logits beyond double
    p = (less / torch.where(temperature > 0, temperature, 1.0)[:, None]).softmax(-1)
    if cut:
        ordered, order = p.sort(-1, descending=True)
        rank = torch.arange(p.shape[-1], device=p.device)
        keep = rank < torch.where(top_k > 0, top_k, p.shape[-1])[:, None]
        keep &= ordered >= min_p[:, None] * ordered[:, :1]
        ordered = torch.where(keep, ordered, 0.0)
        keep &= ordered.cumsum(-1) - ordered < top_p[:, None] * ordered.sum(-1, keepdim=True)
        p = torch.zeros_like(p).scatter(-1, order, torch.where(keep, ordered, 0.0))
    return torch.where(temperature > 0, (p / noise).argmax(-1), best)


def signed(seed: int) -> int:
    """`seed` as 64 bits with a sign: vLLM counts seeds on for further choices, out of their range."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


class Draws:
    """Samples for the rows of an engine by parameters of each, which stand on the device: nothing waits for it."""

    def __init__(self, rows: int, device: torch.device):
        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(rows + 1, dtype=dtype, device=device)  # and of the spare row, which takes the likeliest

        self.temperature, self.top_p, self.min_p = (zeros(torch.double) for _ in range(3))
        self.top_k, self.seed, self.choice = (zeros(torch.long) for _ in range(3))

    def admit(
        self, row: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, choice: int = 0
    ) -> str:
        """Returns the request's `sampling`."""
        self.temperature[row], self.top_p[row], self.min_p[row] = temperature, top_p, min_p
        self.top_k[row], self.seed[row], self.choice[row] = min(top_k, 1 << 62), signed(seed), signed(choice)
        if not temperature:
            return "argmax"
        return "cut" if top_k or top_p < 1 or min_p else "drawn"

    def __call__(
        self,
        logits: torch.Tensor,
        best: torch.Tensor,
        row: torch.Tensor,
        position: torch.Tensor,
        in_use: Counter[str],
    ) -> torch.Tensor:
        """Tokens [n] at positions [n] of rows [n]; the rest as in `sample`. `in_use` counts the requests of each
        `sampling`: what none has is not done."""
        if not (in_use["drawn"] or in_use["cut"]):
            return best
        noise = waiting_times(self.seed[row], self.choice[row], position, logits.shape[-1])
        cuts = self.top_k[row], self.top_p[row], self.min_p[row]
        return sample(logits, best, self.temperature[row], *cuts, noise, in_use["cut"] > 0)
