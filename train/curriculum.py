"""How many recurrences a training step runs, and how many of them carry gradient.

All of it is a pure function of (seed, optimiser step): equal on every rank, under gradient accumulation and after a
resume. The recipe is that of retrofitted recurrence (arXiv 2511.07384), whose sampler is Huginn's (arXiv 2502.05171).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

from loopwise.errors import UserError

if TYPE_CHECKING:
    from .recipe import Recurrence

# Share of the run after which each schedule has reached its end, unless the recipe says otherwise.
RAMPS = {"constant": 0.0, "linear": 0.25, "1-sqrt": 0.75}
SAMPLERS = ("fixed", "poisson-lognormal", "truncated-poisson", "uniform")
SIGMA = 0.5


class Depth(NamedTuple):
    """R of one step, and how many of its last recurrences carry gradient (None: all)."""

    num_recurrences: int
    grad_recurrences: int | None


@dataclass(frozen=True)
class Schedule:
    """A whole number, at least 1, that grows with the step.

    end: the final value.   steps: optimiser steps of the run.   kind: one of `RAMPS`, or `steps`.   ramp: share of the
    run until the end is reached (None: `RAMPS`).   values: for `steps`, (share of the run, value from there on), the
    first at 0, in order; `end` is the last of them.
    """

    end: int
    steps: int
    kind: str = "constant"
    ramp: float | None = None
    values: tuple[tuple[float, int], ...] = ()

    @property
    def top(self) -> int:
        return max([self.end, *(value for _, value in self.values)])

    def at(self, step: int) -> int:
        """ceil(schedule), at least 1, for step 0 <= `step` < `steps`."""
        if self.kind == "steps":
            return [value for share, value in self.values if step >= share * self.steps - 1e-9][-1]
        ramp = RAMPS[self.kind] if self.ramp is None else self.ramp
        done = step / (ramp * self.steps) if ramp * self.steps > 0 else 1.0
        if done >= 1 or self.kind == "constant":
            return self.end
        share = done if self.kind == "linear" else 1 - math.sqrt(1 - done)
        # Rounding error must not lift an exact integer to the next one.
        return max(1, math.ceil(self.end * share - 1e-9))


@dataclass(frozen=True)
class Curriculum:
    """A schedule of the mean, a sampler around it, and truncated backpropagation with a schedule of its own.

    min, max: bounds of a sampled R (max None: 4 times the mean, at least 8; of `uniform`: 2 mean - min).
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
        """The greatest R that any step can have."""
        top = self.mean.top
        if self.sampler == "fixed":
            return top
        if self.max is not None:
            return self.max
        return max(self.min, 2 * top - self.min) if self.sampler == "uniform" else max(8, 4 * top, self.min)

    @property
    def truncates(self) -> bool:
        """Whether some step may run recurrences without gradient."""
        if self.backprop is None:
            return False
        return min([self.backprop.at(0), *(value for _, value in self.backprop.values)]) < self.cap

    def deepest(self) -> Depth:
        """The step that needs most memory."""
        most = None if self.backprop is None else min(self.backprop.top, self.cap)
        return Depth(self.cap, most)

    def trained(self) -> dict[str, int]:
        """`trained_recurrences` of the config of a model that was trained so: the last mean, and the bounds of R."""
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
    """What the section `recurrence` of a recipe says, for a run of `steps`; `mean` is its own, or the model's.

    Raises UserError where `max` is below the mean.
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


def uniforms(seed: int, step: int, what: str = "recurrence") -> tuple[float, float]:
    """Two numbers in (0, 1) that depend on (seed, step) alone: no generator state, and no library version, enters."""
    digest = hashlib.blake2b(f"{what}/{seed}/{step}".encode(), digest_size=16).digest()
    first, second = (int.from_bytes(half, "little") >> 11 for half in (digest[:8], digest[8:]))
    return (first + 0.5) / 2**53, (second + 0.5) / 2**53


def poisson_lognormal(mean: int, cap: int, first: float, second: float) -> int:
    """p = Poisson(LogNormal(ln(mean) - sigma^2/2, sigma)) + 1, at most `cap`, by inversion of two uniforms.

    The rate has mean `mean`, so p has mean `mean` + 1: so do the papers and the authors' code.
    """
    rate = mean * math.exp(SIGMA * NormalDist().inv_cdf(first) - SIGMA**2 / 2)
    below = 0.0
    for count in range(cap - 1):
        below += _poisson(count, rate)
        if second < below:
            return count + 1
    return cap


def truncated_poisson(rate: int, low: int, high: int, uniform: float) -> int:
    """Poisson(rate) given that it lies in low .. high, by inversion."""
    weights = [_poisson(count, rate) for count in range(low, high + 1)]
    total, below = math.fsum(weights), 0.0
    if total == 0:  # so far outside that nothing is left: the nearest bound has almost all of it
        return low if rate < low else high
    for count, weight in enumerate(weights, low):
        below += weight / total
        if uniform < below:
            return count
    return high


def _poisson(count: int, rate: float) -> float:
    return math.exp(count * math.log(rate) - rate - math.lgamma(count + 1))


def nested_depths(seed: int, step: int, recurrences: int, count: int) -> list[int]:
    """`count` different depths out of 1 .. `recurrences`, in order: sub-models of SortedNet (arXiv 2309.00255)."""
    keys = sorted((uniforms(seed, step, f"nested/{depth}")[0], depth) for depth in range(1, recurrences + 1))
    return sorted(depth for _, depth in keys[: min(count, recurrences)])


def capacities(final: list[float], step: int, warmup: int) -> list[float]:
    """Capacity of every recursion at `step`, falling from 1 to `final` along a cosine over `warmup` steps.

    The warm-up of Mixture-of-Recursions (arXiv 2507.10524).
    """
    if step >= warmup:
        return list(final)
    left = 0.5 * (1 + math.cos(math.pi * step / warmup))
    return [capacity + (1 - capacity) * left for capacity in final]
