"""The recipe of `loopwise train`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from loopwise.recipe import Count, Integer, Number, Section
from loopwise.unused import Unused

from .adapters import Adapters
from .data import Data
from .fields import Names, absolute
from .objectives import DEPTHS, Objectives
from .optimiser import Optimiser
from .recurrence import PhaseRecurrence, Recurrence

Checkpointing = Annotated[
    Literal["none", "layer", "recurrence"],
    BeforeValidator(
        lambda value: {"true": "layer", "false": "none"}.get(str(value).lower(), value),
        json_schema_input_type=Literal["none", "layer", "recurrence"] | bool,
    ),
]


class Train(Section):
    """A training run."""

    data: Data
    recurrence: Recurrence | None = None
    objectives: Objectives = Objectives()
    adapters: Adapters | None = None
    optimiser: Optimiser = Optimiser()
    revision: str | None = Field(default=None, description="revision of MODEL when it is a hub id")
    steps: Count | None = Field(default=None, description="optimiser steps (default: computed from epochs)")
    epochs: Number | None = Field(
        default=None,
        gt=0,
        description="passes over the data; without steps (default: 1)",
    )
    batch_size: Count = Field(default=8, description="blocks in a micro-batch, on each process")
    gradient_accumulation: Count = Field(default=1, description="micro-batches a step, on each process")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="compute precision: float32, or bfloat16 autocast; the weights are float32 in both cases",
    )
    gradient_checkpointing: Checkpointing = Field(
        default="none",
        description="recompute activations in the backward pass: none, layer (keeps the input of every layer) or "
        "recurrence (keeps the state before every recurrence; prelude and coda as for layer)",
    )
    compile: Literal["none", "layer"] = Field(
        default="none", description="compile the layers with torch.compile: none or layer"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="dtype of the final weights (default: the dtype of MODEL)"
    )
    seed: Integer = Field(default=0, ge=0, lt=2**32, description="seed of data order, recurrences and dropout")
    log_every: Count = Field(default=10, description="steps between log lines")
    save_every: Count | None = Field(default=None, description="steps between checkpoints (default: none)")
    keep_checkpoints: Count = Field(default=2, description="number of checkpoints to keep, the newest ones")
    eval_every: Count | None = Field(default=None, description="steps between held-out evaluations (default: none)")
    report_to: Names = Field(default=[], description="trackers of transformers: tensorboard, wandb, trackio, ...")

    @model_validator(mode="after")
    def _consistent(self) -> Train:
        if self.steps and self.epochs:
            raise ValueError("steps and epochs both set the length of the run: give one")
        if self.data.streaming and not self.steps:
            raise ValueError("a streamed source has no known length: set steps")
        if self.data.streaming and self.objectives.distillation and self.objectives.distillation.top_k:
            raise ValueError(
                "distillation.top_k reads the text before training, but streaming reads it during training: drop one"
            )
        chosen = next((name for name in DEPTHS if getattr(self.objectives, name) is not None), None)
        if self.data.recurrences and chosen:
            raise ValueError(f"data.recurrences and objectives.{chosen} both choose the depths of a block: give one")
        if self.objectives.deep_supervision and self._truncates():
            raise ValueError(
                "objectives.deep_supervision and recurrence.backprop both cut the gradient between recurrences: "
                "give one"
            )
        (self.recurrence or Recurrence()).check_phases([own for _, own in self.data.recurrence_by_phase()])
        return self

    def facts(self) -> dict[str, Any]:
        """All keys, to compare runs: a section `recurrence` that is left out is one at its defaults, and local
        names are absolute paths."""
        keys = {**self.model_dump(mode="json"), "recurrence": (self.recurrence or Recurrence()).model_dump(mode="json")}
        data, distillation = keys["data"], keys["objectives"]["distillation"]
        for name in ("train", "eval", "streaming"):
            if isinstance(data[name], list):
                data[name] = [absolute(source) for source in data[name]]
        for phase in data["phases"] or []:
            phase["sources"] = {absolute(source): weight for source, weight in phase["sources"].items()}
        if distillation:
            distillation["teacher"] = absolute(distillation["teacher"])
        return keys

    def unused(self) -> Iterator[Unused]:
        if self.recurrence:
            yield from self._unused_of_recurrence(self.recurrence)
        if not self.data.held_out:
            why = "there is no held-out text; set data.eval or data.eval_fraction"
            yield Unused("eval_every", ("data.eval", "data.eval_fraction"), why)
            if self.recurrence:
                yield Unused("recurrence.eval_at", ("data.eval", "data.eval_fraction"), why)
        if self.objectives.exit_gate and self.objectives.exit_gate.stage == "gate" and self.optimiser.train != ["gate"]:
            why = "objectives.exit_gate.stage=gate trains the gate only"
            yield Unused("optimiser.train", ("objectives.exit_gate.stage",), why)

    def _truncates(self) -> bool:
        """True if the recipe has truncated backpropagation."""
        sections = [self.recurrence, *(own for _, own in self.data.recurrence_by_phase())]
        levels = self.recurrence and self.recurrence.backprop_levels
        return bool(levels) or any(section and section.backprop for section in sections)

    def _unused_of_recurrence(self, section: Recurrence) -> Iterator[Unused]:
        """The keys of `section` that no phase of the data takes, and bounds where nothing is sampled."""
        phases = [own for _, own in self.data.recurrence_by_phase()]
        if all(section.in_phase(phase).sampler == "fixed" for phase in phases):
            for name in ("min", "max"):
                why = "it bounds a sampled R, and recurrence.sampler=fixed samples none"
                yield Unused(f"recurrence.{name}", ("recurrence.sampler",), why)
        for name in PhaseRecurrence.model_fields:
            if all(phase and getattr(phase, name) is not None for phase in phases):
                yield Unused(f"recurrence.{name}", ("data.phases",), f"every phase has its own recurrence.{name}")
