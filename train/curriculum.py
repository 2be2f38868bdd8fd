"""The number of recurrences of every training step, and how many of them carry gradient.

A curriculum is a pure function of (seed, optimiser step). The recipe follows retrofitted recurrence (arXiv 2511.07384);
its sampler is Huginn's (arXiv 2502.05171).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from loopwise.errors import UserError

from .recipe import Recurrence
from .samplers import poisson_lognormal, truncated_poisson, uniforms
from .schedule import Schedule


class Depth(NamedTuple):
    """R of one step, and how many of its last recurrences carry gradient (None: all)."""

    num_recurrences: int
    grad_recurrences: int | None


@dataclass(frozen=True)
class Curriculum:
    """A schedule of the mean, a sampler around it, and truncated backpropagation with its own schedule.

    min, max: bounds of a sampled R (max None: 4 times the mean, at least 8; for `uniform`: 2 mean - min).
    backprop: at most this many of the last recurrences carry gradient (None: all).
    """

    mean: Schedule
    sampler: str = "fixed"
    min: int = 1
    max: int | None = None
    backprop: Schedule | None = None
    seed: int = 0

    @property
    def cap(self) -> int:
        """The greatest R of any step."""
        top = self.mean.top
        if self.sampler == "fixed":
            return top
        if self.max is not None:
            return self.max
        return max(self.min, 2 * top - self.min) if self.sampler == "uniform" else max(8, 4 * top, self.min)

    @property
    def truncates(self) -> bool:
        """True if some step may run recurrences without gradient."""
        if self.backprop is None:
            return False
        return min([self.backprop.at(0), *(value for _, value in self.backprop.values)]) < self.cap

    def deepest(self) -> Depth:
        """The step that needs the most memory."""
        most = None if self.backprop is None else min(self.backprop.top, self.cap)
        return Depth(self.cap, most)

    def trained(self) -> dict[str, int]:
        """`trained_recurrences` for the config of the trained model: the last mean, and the bounds of R."""
        fixed = self.sampler == "fixed"
        least = min([self.mean.at(0), *(value for _, value in self.mean.values)]) if fixed else self.min
        return {"mean": min(max(self.mean.end, least), self.cap), "min": least, "max": self.cap}

    def at(self, step: int) -> Depth:
        """R and the number of recurrences with gradient of optimiser step `step`, counted from 0."""
        depth = self._sample(self.mean.at(step), *uniforms(self.seed, step))
        return Depth(depth, None if self.backprop is None else min(self.backprop.at(step), depth))

    def _sample(self, mean: int, first: float, second: float) -> int:
        if self.sampler == "fixed":
            return mean
        if self.sampler == "poisson-lognormal":
            return max(self.min, poisson_lognormal(mean, self.cap, first, second))
        if self.sampler == "truncated-poisson":
            return truncated_poisson(mean, self.min, self.cap, first)
        top = self.cap if self.max is not None else max(self.min, 2 * mean - self.min)
        return self.min + int(first * (top - self.min + 1))


def curriculum_of(keys: Recurrence, mean: int, steps: int, seed: int) -> Curriculum:
    """The curriculum of the recipe section `keys` for a run of `steps`. `mean`: the section's own, or the model's.

    Raises UserError if `keys.max` is below the mean.
    """

    def schedule(prefix: str, end: int) -> Schedule:
        kind, ramp, levels = (getattr(keys, prefix + name) for name in ("schedule", "ramp", "levels"))
        return Schedule(levels[-1][1] if levels else end, steps, kind, ramp, tuple(levels or ()))

    truncated = keys.backprop is not None or keys.backprop_levels is not None
    chosen = Curriculum(
        mean=schedule("", mean),
        sampler=keys.sampler,
        min=keys.min or 1,
        max=keys.max,
        backprop=schedule("backprop_", keys.backprop or 1) if truncated else None,
        seed=seed,
    )
    if keys.max is not None and keys.max < chosen.mean.top:
        raise UserError(
            f"recurrence.max={keys.max} is below the mean of {chosen.mean.top} recurrences; raise it or set "
            "recurrence.mean"
        )
    return chosen
