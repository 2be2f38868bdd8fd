"""Readings: what the exit rules compare after a recurrence, with the memory of the recurrence before.

A value is computed when a rule asks for it. Shapes: L lanes, m lanes of a call, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor


class StateReadings:
    """The states before and after a recurrence [m, D]."""

    def __init__(self, before: Tensor, after: Tensor):
        self.before, self.after = before.float(), after.float()

    @cached_property
    def length(self) -> Tensor:
        """|s| [m]."""
        return self.after.norm(dim=-1)

    @property
    def relative_change(self) -> Tensor:
        """|s - s'| / |s| [m]."""
        return (self.after - self.before).norm(dim=-1) / self.length

    @property
    def cosine(self) -> Tensor:
        """cos(s, s') [m]."""
        return (self.after * self.before).sum(-1) / self.length / self.before.norm(dim=-1)


class LogitMemory:
    """Memory of the readings of logits, for all lanes. place [L]: the row of a lane's distribution."""

    def __init__(self, place: Tensor, vocabulary: int):
        count, device = len(place), place.device
        self.place, self.vocabulary = place, vocabulary
        self.entropy = torch.zeros(count, device=device)
        self.best = torch.zeros(count, dtype=torch.long, device=device)
        self.stable = torch.zeros(count, dtype=torch.long, device=device)
        self.log_p = torch.zeros(0, vocabulary, device=device)  # rows from 0 to the last that a rule compared

    def start(self, lanes: Tensor) -> None:
        """Positions start in `lanes` [m]: before their first recurrence, p is uniform and the entropy 100."""
        self.entropy.index_fill_(0, lanes, 100.0)
        self.best.index_fill_(0, lanes, -1)
        self.stable.index_fill_(0, lanes, 0)
        place = self.place[lanes]
        self.log_p[place[place < len(self.log_p)]] = -math.log(self.vocabulary)


class LogitReadings:
    """The logits [m, V] of `lanes` [m] after a recurrence. Each reading replaces its memory."""

    def __init__(self, memory: LogitMemory, lanes: Tensor, logits: Tensor):
        self.memory, self.lanes = memory, lanes
        self.p = logits.float().softmax(-1)

    def entropy_change(self) -> Tensor:
        """|H(p) - H(p')| [m]."""
        entropy = -(self.p * (self.p + 1e-10).log()).sum(-1)
        change = (entropy - self.memory.entropy[self.lanes]).abs()
        self.memory.entropy[self.lanes] = entropy
        return change

    def stable(self) -> Tensor:
        """Recurrences [m] in a row with the same best token."""
        memory, best = self.memory, self.p.argmax(-1)
        stable = torch.where(best == memory.best[self.lanes], memory.stable[self.lanes] + 1, 0)
        memory.best[self.lanes], memory.stable[self.lanes] = best, stable
        return stable

    def floored(self, share: float = 0.1) -> Tensor:
        """p [m, V], flattened below a share of its maximum."""
        floored = torch.where(self.p < share * self.p.amax(-1, keepdim=True), 1 / self.memory.vocabulary, self.p)
        return floored / floored.sum(-1, keepdim=True)

    def divergence(self, p: Tensor) -> Tensor:
        """KL(p' || p) [m], from the distribution of the recurrence before to p [m, V]."""
        memory = self.memory
        log_p, place = p.log(), memory.place[self.lanes]
        more = int(place.max()) + 1 - len(memory.log_p)
        if more > 0:
            uniform = p.new_full((more, memory.vocabulary), -math.log(memory.vocabulary))
            memory.log_p = torch.cat([memory.log_p, uniform])
        old = memory.log_p[place]
        memory.log_p[place] = log_p
        weight = old.exp()
        return torch.where(weight > 0, weight * (old - log_p), 0).sum(-1)
