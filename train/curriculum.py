"""The number of recurrences of every training step, and how many of them carry gradient.

A curriculum is a pure function of (seed, optimiser step). The recipe follows retrofitted recurrence (arXiv 2511.07384);
its sampler is Huginn's (arXiv 2502.05171).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loopwise.errors import UserError

from .recipe import PhaseRecurrence, Recurrence
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
    records: the means of records that have one of their own.
    """

    mean: Schedule
    sampler: str = "fixed"
    min: int = 1
    max: int | None = None
    backprop: Schedule | None = None
    seed: int = 0
    records: tuple[int, ...] = ()

    @property
    def base(self) -> int:
        """The mean of a run without levels and phases."""
        return self.mean.end

    @property
    def cap(self) -> int:
        """The greatest R of any step."""
        top = max(self.mean.top, *self.records, 1)
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
        if most is not None and self.records:  # rows of fewer recurrences carry gradient earlier
            most = min(most + self.cap - self._least, self.cap)
        return Depth(self.cap, most)

    @property
    def _least(self) -> int:
        """The least R of any step."""
        fixed = self.sampler == "fixed"
        return min([self.mean.at(0), *(x for _, x in self.mean.values), *self.records]) if fixed else self.min

    def trained(self) -> dict[str, int]:
        """`trained_recurrences` for the config of the trained model: the last mean, and the bounds of R."""
        least = self._least
        return {"mean": min(max(self.mean.end, least), self.cap), "min": least, "max": self.cap}

    def at(self, step: int) -> Depth:
        """R and the number of recurrences with gradient of optimiser step `step`, counted from 0."""
        depth = self._sample(self.mean.at(step), *uniforms(self.seed, step))
        return Depth(depth, None if self.backprop is None else min(self.backprop.at(step), depth))

    def of_sample(self, step: int, sample: int, mean: int) -> int:
        """R of sample number `sample`, in `step`, whose record has `mean` of its own; 0: R of the step."""
        if not mean:
            return self.at(step).num_recurrences
        return self._sample(mean, *uniforms(self.seed, sample, "record"))

    def _sample(self, mean: int, first: float, second: float) -> int:
        if self.sampler == "fixed":
            return mean
        if self.sampler == "poisson-lognormal":
            return max(self.min, poisson_lognormal(mean, self.cap, first, second))
        if self.sampler == "truncated-poisson":
            return truncated_poisson(mean, self.min, self.cap, first)
        top = self.cap if self.max is not None else max(self.min, 2 * mean - self.min)
        return self.min + int(first * (top - self.min + 1))


@dataclass(frozen=True)
class PhasedCurriculum(Curriculum):
    """Curricula in turn, one for each phase of the data; the fields of `Curriculum` sum them up.

    parts: (first step of the phase, its curriculum), in order. A step with samples of two phases belongs to the one
    that has more of them.   section: the mean of phases without a mean of their own.
    """

    parts: tuple[tuple[int, Curriculum], ...] = ()
    section: int = 1

    @property
    def base(self) -> int:
        return self.section

    @property
    def cap(self) -> int:
        return max(part.cap for _, part in self.parts)

    @property
    def truncates(self) -> bool:
        return any(part.truncates for _, part in self.parts)

    def deepest(self) -> Depth:
        return max((part.deepest() for _, part in self.parts), key=lambda x: (x.grad_recurrences or x[0], x[0]))

    def trained(self) -> dict[str, int]:
        found = [part.trained() for _, part in self.parts]
        return {"mean": found[-1]["mean"], "min": min(x["min"] for x in found), "max": max(x["max"] for x in found)}

    def at(self, step: int) -> Depth:
        return self._part(step).at(step)

    def of_sample(self, step: int, sample: int, mean: int) -> int:
        return self._part(step).of_sample(step, sample, mean)

    def _part(self, step: int) -> Curriculum:
        return [part for first, part in self.parts if step >= first][-1]


Phases = Sequence[tuple[float, PhaseRecurrence | None]]


def curriculum_of(
    keys: Recurrence, mean: int, steps: int, seed: int, phases: Phases = (), records: tuple[int, ...] = ()
) -> Curriculum:
    """The curriculum of the recipe section `keys` for a run of `steps`. `mean`: the section's own, or the model's.

    phases: of the data, (share of the run, keys of its own).   records: means of records.   Raises UserError if `max`
    is below a mean, if `min` is above all that `uniform` draws, and for a mean that changes without effect.
    """
    if not any(own for _, own in phases):
        return _single(keys, mean, steps, seed, records, "")
    parts: list[tuple[int, Curriculum]] = []
    begin = 0.0
    for i, (share, own) in enumerate(phases):
        chosen = keys.in_phase(own)
        place = f"data.phases.{i}." if own else ""
        parts.append((round(begin * steps), _single(chosen, (own and own.mean) or mean, steps, seed, records, place)))
        begin += share

    def schedule(values: list[int]) -> Schedule:
        shares = [first / steps for first, _ in parts]
        return Schedule(values[-1], steps, "steps", None, tuple(zip(shares, values, strict=True)))

    each = [part for _, part in parts]
    carried = [min(part.backprop.top, part.cap) if part.backprop else part.cap for part in each]
    return PhasedCurriculum(
        mean=schedule([part.mean.end for part in each]),
        sampler=", ".join(dict.fromkeys(part.sampler for part in each)),
        min=min(part.min for part in each),
        max=max(part.cap for part in each),
        backprop=schedule(carried) if any(part.backprop for part in each) else None,
        seed=seed,
        parts=tuple(parts),
        section=mean,
    )


def _single(keys: Recurrence, mean: int, steps: int, seed: int, records: tuple[int, ...], place: str) -> Curriculum:
    """The curriculum of `keys` from beginning to end. `place`: leads the keys in messages."""

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
        records=records,
    )
    if keys.sampler == "uniform" and keys.max is None and chosen.mean.top < chosen.min:
        raise UserError(
            f"{place}recurrence.min={chosen.min} is above the mean of {chosen.mean.top} recurrences; lower it, or set "
            f"{place}recurrence.mean or {place}recurrence.max"
        )
    if keys.sampler == "uniform" and keys.max is not None and (records or keys.schedule != "constant"):
        what = "data.recurrences sets" if records else f"recurrence.schedule={keys.schedule} changes"
        raise UserError(
            f"{place}recurrence.sampler=uniform draws from min to max, whatever the mean, and {what} the mean; leave "
            f"{place}recurrence.max={keys.max} out, or choose sampler=truncated-poisson"
        )
    if keys.max is not None and keys.sampler != "fixed":
        if keys.max < chosen.mean.top:
            raise UserError(
                f"{place}recurrence.max={keys.max} is below the mean of {chosen.mean.top} recurrences; raise it or set "
                f"{place}recurrence.mean"
            )
        if keys.max < max(records, default=0):
            raise UserError(
                f"{place}recurrence.max={keys.max} is below {max(records)} of data.recurrences.table; raise it"
            )
    return chosen
