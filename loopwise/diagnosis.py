"""Effects of the recurrences: their effect on held-out loss, the size of the states, and plain lines about both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

MOST, HUGE = 1024, 1e30  # recurrences in a record, and a number there
FEW = 8  # sequences; with fewer, a standard error is not reliable
LAST = 3  # recurrences that show how the states grow
GROWS = 0.1  # growth of a recurrence that counts
STEADY = 0.8  # of the growth that is left two recurrences later; where |s_r| grows like r, less is left up to r = 11

NO_CHANGE = (
    "the recurrences change nothing: R=1 and R={} agree within noise; this model supports no claim about depth, exits "
    "or waves"
)
UNBOUNDED = (
    "the states grow by a factor of {:.2f} in each recurrence, without bound: latent-diff never fires below a "
    "threshold of {:.2f}; use exit_rule=cosine, or convert with a recurrence_norm"
)


@dataclass
class States:
    """Means over tokens, by recurrence.

    norm: |s_r| for r = 1, 2, ..   change: |s_r - s_(r-1)| / |s_r| for r = 2, 3, ..   growth: |s_r| / |s_(r-1)| for
    r = 2, 3, .., geometric means, so that one long state does not hide the others.
    """

    norm: list[float]
    change: list[float]
    growth: list[float]

    @classmethod
    def of(cls, sums: torch.Tensor, count: int) -> States:
        """From sums [3, R] of `state_sums` over `count` tokens."""
        norm, change, growth = (sums / count).tolist()
        return cls(norm, change[1:], [math.exp(x) for x in growth[1:]])

    @property
    def unbounded(self) -> float | None:
        """The factor by which the states grow in a recurrence, if they do so geometrically; else None."""
        excess = [factor - 1 for factor in self.growth[-LAST:]]
        steady = len(excess) == LAST and min(excess) >= GROWS and excess[-1] >= STEADY * excess[0]
        return self.growth[-1] if steady else None


@dataclass
class Effect:
    """The effect of recurrences on held-out data, at 1 to `num_recurrences` of them.

    changes_nothing: True where the losses of the least and the most agree within noise; None if that is unknown.
    """

    num_recurrences: int
    changes_nothing: bool | None
    states: States | None

    def lines(self) -> list[str]:
        """The sizes of the states, and what is wrong with the recurrences."""
        sizes = state_lines(self.states.norm, self.states.change) if self.states else []
        return sizes + lines(self.changes_nothing, self.num_recurrences, self.states)

    def record(self) -> dict[str, Any]:
        """This as JSON, which `of` reads."""
        return asdict(self)

    @classmethod
    def of(cls, record: Any) -> Effect | None:
        """The effect in a `record`; None for any other content, as a stranger's record may have."""
        fields = record if isinstance(record, dict) else {}
        states, most, nothing = (fields.get(name) for name in ("states", "num_recurrences", "changes_nothing"))
        kept: list[Any] = (
            [states.get(name) for name in ("norm", "change", "growth")] if isinstance(states, dict) else []
        )
        if type(most) is not int or not 0 < most <= MOST or not (nothing is None or isinstance(nothing, bool)):
            return None
        if not all(isinstance(one, list) and len(one) <= MOST for one in kept):
            return None
        if not all(isinstance(x, int | float) and abs(x) < HUGE for one in kept for x in one):
            return None
        return cls(most, nothing, States(*kept) if kept else None)


def state_lines(norm: Sequence[float] | None, change: Sequence[float] | None) -> list[str]:
    """Lines on |s_r| for r = 1, 2, .. and |s_r - s_(r-1)| / |s_r| for r = 2, 3, ..; none for None or no values."""
    each = (("|s_r|, r = 1", norm), ("|s_r - s_(r-1)| / |s_r|, r = 2", change))
    return [f"{name} ..: {' '.join(f'{value:.3g}' for value in values)}" for name, values in each if values]


def state_sums(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Sums [3, R] float64 on the CPU over the tokens `real` [B, T] of states [R, B, T, D], for `States.of`.

    |s_r|; |s_r - s_(r-1)| / |s_r|, and log(|s_r| / |s_(r-1)|), which are 0 for r = 1.
    """
    least = 1e-30
    norm = states.float().norm(dim=-1)[:, real].cpu().double()
    move = (states[1:] - states[:-1]).float().norm(dim=-1)[:, real].cpu().double() / norm[1:].clamp(min=least)
    log = norm.clamp(min=least).log().diff(dim=0)
    none = torch.zeros(1, norm.shape[1], dtype=torch.float64)
    return torch.stack([norm, torch.cat([none, move]), torch.cat([none, log])]).sum(-1)


def standard_error(sums: np.ndarray, tokens: np.ndarray) -> float | None:
    """Standard error of a mean per token over sequences, as a ratio of two means. None for a single sequence.

    sums, tokens [n]: each sequence's sum and number of tokens.
    """
    count = len(sums)
    if count < 2:
        return None
    residuals = sums - tokens * (sums.sum() / tokens.sum())
    return float(math.sqrt(count / (count - 1) * (residuals**2).sum()) / tokens.sum())


def gain(first: np.ndarray, last: np.ndarray, tokens: np.ndarray) -> tuple[float, float | None, bool | None]:
    """(loss at R=1 less that at the most recurrences, its standard error, True if it is within two of them).

    first, last: sums of losses of each sequence [n] with `tokens` [n], so that the error is a paired one. The third is
    None if that is unknown.
    """
    difference = first - last
    error = standard_error(difference, tokens)
    value = float(difference.sum() / tokens.sum())
    return value, error, None if error is None or len(difference) < FEW else abs(value) <= 2 * error


def lines(changes_nothing: bool | None, most: int, states: States | None) -> list[str]:
    """Lines on what is wrong with the recurrences of a model measured at 1 to `most` of them."""
    found = [NO_CHANGE.format(most)] if changes_nothing else []
    factor = states.unbounded if states else None
    return found + ([UNBOUNDED.format(factor, 1 - 1 / factor)] if factor else [])
