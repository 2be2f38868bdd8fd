"""Sampling by Gumbel-max with counter-based noise: a token depends on its logits and on (seed, choice, position) alone.

So a sample is the same whatever else is in the batch, and whichever decoder found its logits.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from ...model.initial_state import counter_bits


def waiting_times(seed: Tensor, choice: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """Exponential noise [n, V] as a function of (seed, choice, position) [n] and token; argmax p / noise samples p.

    float64, from 53 bits, so that the tail of a large vocabulary is not cut.
    """
    bits = counter_bits(seed, choice, position, vocabulary)
    return -torch.log1p(-(((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) / (1 << 53))


def sample(
    logits: Tensor,
    best: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    noise: Tensor,
    cut: bool = True,
) -> Tensor:
    """Tokens [n] for logits [n, V], of which `best` [n] are the likeliest; temperature 0 takes these, top_k 0, top_p 1
    and min_p 0 cut nothing (each [n]). top_p is a share of what the other two leave. `cut`: a row cuts.

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


def penalise(
    logits: Tensor, before: Tensor, generated: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Logits [n, V] with penalties [n], float32 or wider. A token that was there `before`, in the prompt or after it,
    has its logit divided by `repetition`, or multiplied if it is negative; one that was generated has `presence`
    subtracted, and `frequency` for each time. `before`, `generated` [n, V]: how often tokens were there. As vLLM; the
    first is transformers' RepetitionPenaltyLogitsProcessor."""
    wide = logits.float() if logits.element_size() < 4 else logits
    repeated = torch.where(wide < 0, wide * repetition[:, None], wide / repetition[:, None])
    wide = torch.where(before > 0, repeated, wide)
    return wide - frequency[:, None] * generated - presence[:, None] * (generated > 0)


class Draws:
    """Samples for the rows of an engine by parameters of each, which stand on the device: nothing waits for it."""

    def __init__(self, rows: int, device: torch.device):
        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(rows + 1, dtype=dtype, device=device)  # and of the spare row, which takes the likeliest

        self.temperature, self.top_p, self.min_p = (zeros(torch.double) for _ in range(3))
        self.top_k, self.seed, self.choice = (zeros(torch.long) for _ in range(3))
        self.repetition, self.presence, self.frequency = (zeros(torch.float32) for _ in range(3))
        self.penalised, self.prompt = zeros(torch.bool), zeros(torch.long)  # prompt: how long it is
        self.tokens = torch.empty(0, dtype=torch.long, device=device)  # [rows + 1, positions] once somebody needs it

    def admit(
        self, row: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, choice: int = 0
    ) -> str:
        """Returns the request's `sampling`."""
        self.penalised[row] = False
        self.temperature[row], self.top_p[row], self.min_p[row] = temperature, top_p, min_p
        self.top_k[row], self.seed[row], self.choice[row] = min(top_k, 1 << 62), signed(seed), signed(choice)
        if not temperature:
            return "argmax"
        return "cut" if top_k or top_p < 1 or min_p else "drawn"

    def penalise(
        self, row: int, prompt: list[int], length: int, repetition: float, presence: float, frequency: float
    ) -> None:
        """Let the request that was admitted to `row` have penalties. Its `prompt` goes on to `length` positions at
        most, the same for all rows."""
        if not len(self.tokens):
            self.tokens = self.prompt.new_zeros(len(self.prompt), length + 1)
        self.penalised[row], self.prompt[row] = True, len(prompt)
        self.repetition[row], self.presence[row], self.frequency[row] = repetition, presence, frequency
        self.tokens[row, : len(prompt)] = torch.tensor(prompt, device=self.tokens.device)

    def __call__(self, logits: Tensor, best: Tensor, row: Tensor, position: Tensor, in_use: Counter[str]) -> Tensor:
        """Tokens [n] at positions [n] of rows [n]; the rest as in `sample`.

        `in_use` counts the requests with each `sampling`, and those that are `penalised`; steps of none are skipped.
        """
        if in_use["penalised"]:
            logits, best = self._penalised(logits, best, row, position)
        if in_use["drawn"] or in_use["cut"]:
            noise = waiting_times(self.seed[row], self.choice[row], position, logits.shape[-1])
            cuts = self.top_k[row], self.top_p[row], self.min_p[row]
            best = sample(logits, best, self.temperature[row], *cuts, noise, in_use["cut"] > 0)
        if in_use["penalised"]:
            self.tokens.index_put_((row, position), best)
        return best

    def _penalised(self, logits: Tensor, best: Tensor, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, V] with penalties, and the likeliest tokens [n] by them.

        Drafts of a wave, beyond `position`, do not count as tokens before it.
        """
        tokens, place = self.tokens[row], torch.arange(self.tokens.shape[1], device=row.device)
        before = (place < position[:, None]).float()
        generated = before * (place >= self.prompt[row][:, None])
        before, generated = (
            torch.zeros(logits.shape, device=row.device).scatter_add(1, tokens, each) for each in (before, generated)
        )
        changed = penalise(logits, before, generated, self.repetition[row], self.presence[row], self.frequency[row])
        penalised = self.penalised[row]
        changed = torch.where(penalised[:, None], changed, logits)
        return changed, torch.where(penalised, changed.argmax(-1), best)
