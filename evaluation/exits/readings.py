"""The values that an exit rule reads at each depth of a position, and the thresholds that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...serve.engine.exits import RULES
from .forced import Span


class Recorder:
    """Records the values of a rule at the positions that give the tokens of `spans`.

    values, read [P, R]: of each position, after each recurrence; NaN where the rule may not end the position.
    """

    def __init__(self, spans: list[Span], num_recurrences: int):
        sizes = [span.answers for span in spans]
        # The answer's first token comes of position start - 1.
        self.shift = torch.tensor(np.cumsum([0, *sizes[:-1]]) - [span.start - 1 for span in spans])
        self.read = torch.full((sum(sizes), num_recurrences), math.nan, dtype=torch.float64)

    def __call__(self, rule: str, span: Tensor, position: Tensor, depth: Tensor, value: Tensor) -> None:
        place = self.shift[span.cpu()] + position.cpu()
        self.read[place, depth.cpu()] = value.double().cpu()

    @property
    def values(self) -> np.ndarray:
        """The values that were read so far."""
        return self.read.numpy()


@dataclass
class Saved:
    """The thresholds of a rule by the share of the recurrences that they save.

    extremes: sorted. A position leaves after r recurrences or earlier if the least value up to r is below the threshold
    (the greatest has reached it, for a rule that rises). These extremes of all positions and all r below R are pooled:
    the share of them on that side is the share of the recurrences from `min_recurrences` to R that is saved.
    """

    rule: str
    extremes: np.ndarray

    @classmethod
    def of(cls, rule: str, values: np.ndarray, min_recurrences: int) -> Saved:
        """The thresholds for values [P, R] that were read at full depth."""
        within = values[:, min_recurrences - 1 : -1]
        running = (np.fmax if RULES[rule].rises else np.fmin).accumulate(within, axis=1)
        return cls(rule, np.sort(running[np.isfinite(running)]))

    def threshold(self, share: float) -> float | None:
        """The threshold that saves about this share, to three digits. None where the rule has none above 0."""
        if not len(self.extremes):
            return None
        if self.rule == "argmax-stability":  # it counts
            counts = np.arange(1, self.extremes[-1] + 1)
            saved = 1 - np.searchsorted(self.extremes, counts) / len(self.extremes)
            return float(counts[np.abs(saved - share).argmin()]) if len(counts) else None
        value = float(np.quantile(self.extremes, 1 - share if RULES[self.rule].rises else share))
        rounded = float(f"{value:.3g}")
        return rounded if rounded > 0 and math.isfinite(rounded) else None

    def thresholds(self, count: int) -> list[float]:
        """At most `count` thresholds, whose shares are evenly spread."""
        found = {self.threshold(share) for share in np.linspace(0, 1, count + 2)[1:-1]}
        return sorted(threshold for threshold in found if threshold is not None)
