"""The section `recurrence`: the curriculum of recurrences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from pydantic import Field, model_validator

from loopwise.recipe import Count, Section
from loopwise.unused import Unused

from ..schedule import RAMPS
from .fields import Depths, Fraction, Levels

Growth = Literal["constant", "linear", "1-sqrt", "steps"]
Sampler = Literal["fixed", "poisson-lognormal", "truncated-poisson", "uniform"]
SAMPLERS = get_args(Sampler)


class PhaseRecurrence(Section):
    """The curriculum of one phase of the data. A key that is left out has its value of the section `recurrence`."""

    mean: Count | None = Field(default=None, description="mean recurrences in this phase")
    sampler: Sampler | None = Field(default=None, description="like recurrence.sampler, for this phase")
    min: Count | None = Field(default=None, description="like recurrence.min, for this phase")
    max: Count | None = Field(default=None, description="like recurrence.max, for this phase")
    backprop: Count | None = Field(default=None, description="like recurrence.backprop, for this phase")


class Recurrence(Section):
    """The recurrence curriculum; only for recurrent-depth models."""

    mean: Count | None = Field(default=None, description="mean recurrences at the end (default: the model's own)")
    schedule: Growth = Field(
        default="constant", description="growth of the mean: constant, linear, 1-sqrt, or steps (listed in levels)"
    )
    ramp: Fraction | None = Field(
        default=None,
        description="share of the steps until the mean reaches its end "
        f"(default: linear {RAMPS['linear']}, 1-sqrt {RAMPS['1-sqrt']})",
    )
    levels: Levels | None = Field(
        default=None, description="for schedule=steps: {share of the run: mean from there on}, as {0: 2, 0.5: 4}"
    )
    sampler: Sampler = Field(
        default="fixed",
        description="R of a step: fixed (the mean), poisson-lognormal (around mean + 1), truncated-poisson (rate mean, "
        "within min and max), uniform (min to 2 mean - min; with max: min to max, whatever the mean)",
    )
    min: Count | None = Field(default=None, description="least sampled R (default: 1)")
    max: Count | None = Field(default=None, description="cap on a sampled R (default: 4 x mean, at least 8)")
    backprop: Count | None = Field(
        default=None,
        description="truncated backpropagation: recurrences, counted from the last, that carry gradient (default: all)",
    )
    backprop_schedule: Growth = Field(default="constant", description="growth of backprop, like schedule for the mean")
    backprop_ramp: Fraction | None = Field(default=None, description="like ramp, for backprop")
    backprop_levels: Levels | None = Field(default=None, description="like levels, for backprop")
    capacity_warmup: Fraction | None = Field(
        default=None,
        description="share of the steps over which an expert-choice router's capacities fall from 1 along a cosine",
    )
    eval_at: Depths | None = Field(
        default=None, min_length=1, description="recurrences to evaluate at during training (default: 1 and the mean)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Recurrence:
        if self.max is not None and self.mean is not None and self.max < self.mean:
            raise ValueError(f"max={self.max} is below mean={self.mean}")
        if self.min is not None and self.max is not None and self.max < self.min:
            raise ValueError(f"max={self.max} is below min={self.min}")
        for prefix in ("", "backprop_"):
            if getattr(self, prefix + "schedule") == "steps" and getattr(self, prefix + "levels") is None:
                raise ValueError(f"{prefix}schedule=steps needs {prefix}levels, as {{0: 2, 0.5: 4}}")
        if self.backprop is None and self.backprop_schedule in ("linear", "1-sqrt"):
            raise ValueError(f"backprop_schedule={self.backprop_schedule} needs backprop, its end")
        return self

    def in_phase(self, phase: PhaseRecurrence | None) -> Recurrence:
        """This section with the keys that `phase` sets."""
        return self.model_copy(update=phase.model_dump(exclude_none=True) if phase else {})

    def check_phases(self, phases: list[PhaseRecurrence | None]) -> None:
        """Raises ValueError for phases that contradict this section, or have a key without effect."""
        if not any(phases):
            return
        for prefix, end in (("", "mean"), ("backprop_", "backprop")):
            if (schedule := getattr(self, prefix + "schedule")) != "constant":
                raise ValueError(
                    f"recurrence.{prefix}schedule={schedule} and the recurrence of data.phases both set {end} by step: "
                    "give one"
                )
        for i, phase in enumerate(phases):
            chosen, key = self.in_phase(phase), f"data.phases.{i}.recurrence"
            for name in ("min", "max"):
                if chosen.sampler == "fixed" and (value := getattr(phase, name, None)) is not None:
                    raise ValueError(
                        f"{key}.{name}={value} has no effect: it bounds a sampled R, and this phase's sampler=fixed "
                        "samples none"
                    )
            if chosen.max is not None and chosen.sampler != "fixed":
                for name in ("mean", "min"):
                    if (value := getattr(chosen, name)) is not None and chosen.max < value:
                        raise ValueError(f"{key}: max={chosen.max} is below {name}={value}")

    def unused(self) -> Iterator[Unused]:
        for prefix, end in (("", "mean"), ("backprop_", "backprop")):
            schedule = getattr(self, prefix + "schedule")
            switches = (f"{prefix}schedule", f"{prefix}levels")
            if schedule in ("constant", "steps"):
                why = f"it belongs to recurrence.{prefix}schedule=linear or 1-sqrt, not to {schedule}"
                yield Unused(f"{prefix}ramp", switches, why)
            if schedule == "steps":
                yield Unused(end, switches, f"recurrence.{prefix}levels lists all values")
            else:
                why = f"it belongs to recurrence.{prefix}schedule=steps, not to {schedule}"
                yield Unused(f"{prefix}levels", switches, why)
        if self.backprop is None and self.backprop_levels is None:
            yield Unused(
                "backprop_schedule", ("backprop",), "without recurrence.backprop all recurrences carry gradient"
            )
