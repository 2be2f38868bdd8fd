"""Readings: what the exit rules compare after a recurrence, with the memory of the recurrence before.

A value is computed when a rule asks for it. Shapes: L lanes, m lanes of a call, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

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
    """Memory of the readings of logits: small numbers of every lane [L], and one distribution [V] for each row.

    Plain decoding has one position of a row at a time under a rule, whose distribution is kept. A wave or a prompt has
    many; theirs are computed anew from the states before, as a table for all of them takes gigabytes.
    """

    def __init__(self, lanes: int, rows: int, vocabulary: int, device: torch.device):
        self.rows, self.vocabulary, self.device = rows, vocabulary, device
        self.entropy = torch.zeros(lanes, device=device)
        self.best = torch.zeros(lanes, dtype=torch.long, device=device)
        self.stable = torch.zeros(lanes, dtype=torch.long, device=device)

    @cached_property
    def log_p(self) -> Tensor:
        """Distributions [rows, V], allocated once a rule compares them."""
        return torch.empty(self.rows, self.vocabulary, device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, with all distributions, which may come later."""
        distributions = self.rows * self.vocabulary * self.entropy.element_size()
        return distributions + sum(each.nbytes for each in (self.entropy, self.best, self.stable))

    def start(self, lanes: Tensor) -> None:
        """Positions start in `lanes` [m]: before their first recurrence, the entropy is 100."""
        self.entropy.index_fill_(0, lanes, 100.0)
        self.best.index_fill_(0, lanes, -1)
        self.stable.index_fill_(0, lanes, 0)


class Earlier(NamedTuple):
    """The recurrence before, of lanes [m] in rows `row` [m]. kept [m]: the row has its distribution.   none [m]: there
    was none, so p' is uniform.   logits [k, V]: those of the k lanes that are neither."""

    row: Tensor
    kept: Tensor
    none: Tensor
    logits: Tensor


class LogitReadings:
    """The logits [m, V] of `lanes` [m] after a recurrence. Each reading replaces its memory."""

    def __init__(self, memory: LogitMemory, lanes: Tensor, logits: Tensor, earlier: Earlier):
        self.memory, self.lanes, self.earlier = memory, lanes, earlier
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

    def divergence(self, shape: Callable[[Tensor], Tensor] = lambda p: p) -> Tensor:
        """KL(p' || p) [m], from the distribution of the recurrence before to p [m, V], both changed by `shape`."""
        memory, (row, kept, none, logits) = self.memory, self.earlier
        log_p, held = shape(self.p).log(), kept & ~none
        old = torch.full_like(log_p, -math.log(memory.vocabulary))
        old[held] = memory.log_p[row[held]]
        old[~kept & ~none] = shape(logits.float().softmax(-1)).log()
        memory.log_p[row[kept]] = log_p[kept]
        weight = old.exp()
        return torch.where(weight > 0, weight * (old - log_p), 0).sum(-1)


def floored(p: Tensor, share: float = 0.1) -> Tensor:
    """p [m, V], flattened below a share of its maximum."""
    flat = torch.where(p < share * p.amax(-1, keepdim=True), 1 / p.shape[-1], p)
    return flat / flat.sum(-1, keepdim=True)
