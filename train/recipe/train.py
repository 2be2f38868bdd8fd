"""What `loopwise train` and `loopwise eval` can be told. No torch here: `--help` prints these keys."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from loopwise.recipe import Count, Counts, Integer, Number, Section
from loopwise.unused import Unused

from . import tasks
from .curriculum import RAMPS
from .recipe_objectives import Objectives


def _named(values: list[str]) -> list[str]:
    if "" in values:
        raise ValueError("an empty name; the empty path would be the current directory")
    for source, rest in itertools.pairwise(values):  # task:hops?hops=1,2 is two items
        if tasks.is_task(source) and "=" in source and re.fullmatch(r"[\d.+]+(&.*)?", rest):
            raise ValueError(
                f"{source},{rest}: a comma ends a source; numbers of a task's parameter are joined by +, or a range: "
                "hops=1+2, hops=1..4"
            )
    return values


def _once(values: list[Any]) -> list[Any]:
    if twice := next((value for value in values if values.count(value) > 1), None):
        raise ValueError(f"{twice} stands twice; once is enough")
    return values


Strings = Annotated[list[str], AfterValidator(_named)]
Names = Annotated[Strings, AfterValidator(_once)]
Depths = Annotated[Counts, AfterValidator(_once)]
Training = AfterValidator(lambda sources: [tasks.placed(source, tasks.TRAIN) for source in sources])
HeldOut = AfterValidator(lambda sources: [tasks.placed(source, tasks.HELD_OUT) for source in sources])
# Fields of a request that change how deep a server goes; eval sets all others itself.
REQUEST = ("min_recurrences", "exit_rule", "exit_threshold", "prompt_exit", "decoder", "wave", "diffusion")
COOLDOWN = 0.2
BadRecords = Literal["stop", "skip"]
BAD = "a record without what is asked for, or a named file that is not UTF-8"
Fraction = Annotated[Number, Field(ge=0, le=1)]
Pair = tuple[Number, Number]


def _levels(value: object) -> object:
    """{share: number} in order, the first share 0."""
    if not isinstance(value, dict) or not value:
        raise ValueError("a mapping from shares of the run to numbers, as {0: 2, 0.5: 4}")
    levels = sorted((float(share), number) for share, number in value.items())
    if levels[0][0] != 0:
        raise ValueError("the first share is 0, where the run begins")
    return levels


Levels = Annotated[list[tuple[Fraction, Count]], BeforeValidator(_levels), PlainSerializer(lambda levels: dict(levels))]


class Phase(Section):
    """A part of the run with a mixture of its own."""

    share: Number = Field(gt=0, le=1, description="of the run's steps")
    sources: Annotated[
        dict[str, Annotated[Number, Field(gt=0)]],
        AfterValidator(lambda given: {tasks.placed(source, tasks.TRAIN): weight for source, weight in given.items()}),
    ] = Field(min_length=1, description="{source: weight}")


class Data(Section):
    """Where the text comes from and how it is cut into blocks."""

    train: Annotated[Strings, Training] = Field(
        default=[],
        description="source or list of sources: a .jsonl, .parquet or text file, a directory or glob of such files, "
        "a `datasets` hub id or saved directory, or a generated task as task:hops?hops=1..8",
    )
    phases: list[Phase] | None = Field(
        default=None,
        min_length=1,
        description="instead of train: a list of {share: of the run, sources: {source: weight}}, in order; the shares "
        "sum to 1",
    )
    eval: Annotated[Strings, HeldOut] | None = Field(default=None, description="held-out source or sources")
    eval_fraction: Fraction = Field(
        default=0.0,
        lt=0.5,
        description="held-out share of data.train, split off by document, where data.eval is not given",
    )
    streaming: bool | Annotated[Strings, Training] = Field(
        default=False,
        description="training sources that are read while training, not before: true for all, or a list of them",
    )
    window: Count = Field(
        default=1000,
        description="documents of a streamed source that are packed and whose blocks are shuffled together",
    )
    text_field: str = Field(default="text", description="field of a record that holds the text (jsonl, datasets)")
    chat_field: str | None = Field(
        default=None,
        description="field that holds a conversation, a list of {role, content}, instead of text_field: it goes "
        "through the tokenizer's chat template, and only what the assistant says is learned",
    )
    split: str = Field(default="train", description="split of a `datasets` source")
    subset: str | None = Field(default=None, description="subset (configuration) of a `datasets` source")
    sequence_length: Integer = Field(
        default=1024, ge=2, description="tokens in a block; documents are joined by EOS and packed"
    )
    separate_documents: bool = Field(
        default=False, description="whether documents packed into one block attend to themselves alone"
    )
    bad_records: BadRecords = Field(
        default="stop", description=f"{BAD}: stop the run, or skip it; it is named either way"
    )
    cache: str | None = Field(
        default=None, description="directory in which the tokens of local files are kept for later runs"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if bool(self.train) == bool(self.phases):
            raise ValueError("train and phases are two ways to name the text: give one")
        if self.phases and abs(sum(phase.share for phase in self.phases) - 1) > 1e-6:
            raise ValueError(f"the shares of phases sum to {sum(phase.share for phase in self.phases):g}, not to 1")
        if self.eval and self.eval_fraction:
            raise ValueError("eval and eval_fraction are two ways to name held-out text: give one")
        if self.streaming and self.eval_fraction:
            raise ValueError(
                "eval_fraction splits text that is read before training, streaming reads it then: use eval"
            )
        names = [name for part in self.parts() for name in part]
        for name in self.streaming if isinstance(self.streaming, list) else []:
            if name not in names:
                raise ValueError(f"streaming: {name!r} is none of the training sources {', '.join(map(repr, names))}")
        for part, streamed in zip(self.parts(), self.streamed(), strict=True):
            if streamed and isinstance(self.streaming, list) and set(part) - set(self.streaming):
                raise ValueError("streaming: to mix streamed with other sources, name them in phases, with weights")
        return self

    def unused(self) -> Iterator[Unused]:
        if not self.streaming:
            yield Unused("window", ("streaming",), "it belongs to streamed sources, and data.streaming names none")
        if self.chat_field is not None:
            why = f"data.chat_field={self.chat_field} is read instead; give one of the two"
            yield Unused("text_field", ("chat_field",), why)
        if all(self.streamed()):
            yield Unused("cache", ("streaming",), "it keeps tokens of local files, and all sources are streamed")

    @property
    def field(self) -> str:
        return self.chat_field or self.text_field

    def names(self) -> list[str]:
        """The sources of `phases`, each once."""
        return list(dict.fromkeys(name for phase in self.phases or [] for name in phase.sources))

    def parts(self) -> list[list[str]]:
        """The sources whose blocks are mixed by weight: all of `train` together, or each of `phases` for itself."""
        return [[name] for name in self.names()] or [self.train]

    def streamed(self) -> list[bool]:
        """Which of `parts` are read while training."""
        named = self.streaming if isinstance(self.streaming, list) else None
        return [bool(self.streaming) if named is None else bool({*part} & {*named}) for part in self.parts()]

    def mixture(self) -> list[tuple[float, list[float]]]:
        """(share of the run, weight of each of `parts`) of every phase."""
        if not self.phases:
            return [(1.0, [1.0])]
        return [(phase.share, [phase.sources.get(name, 0.0) for name in self.names()]) for phase in self.phases]

    @property
    def held_out(self) -> bool:
        return bool(self.eval or self.eval_fraction)


class Recurrence(Section):
    """The recurrence curriculum; only for recurrent-depth models."""

    mean: Count | None = Field(default=None, description="mean recurrences at the end (default: the model's own)")
    schedule: Literal["constant", "linear", "1-sqrt", "steps"] = Field(
        default="constant", description="growth of the mean: constant, linear, 1-sqrt, or steps (the list in levels)"
    )
    ramp: Fraction | None = Field(
        default=None,
        description="share of the steps until the mean is reached "
        f"(default: linear {RAMPS['linear']}, 1-sqrt {RAMPS['1-sqrt']})",
    )
    levels: Levels | None = Field(
        default=None, description="for schedule=steps: {share of the run: mean from there on}, as {0: 2, 0.5: 4}"
    )
    sampler: Literal["fixed", "poisson-lognormal", "truncated-poisson", "uniform"] = Field(
        default="fixed",
        description="R of a step: fixed (the mean), poisson-lognormal (around mean + 1), truncated-poisson (of rate "
        "mean, within min and max), uniform (min to 2 mean - min, or to max)",
    )
    min: Count | None = Field(default=None, description="least sampled R (default: 1)")
    max: Count | None = Field(default=None, description="cap on a sampled R (default: 4 x mean, at least 8)")
    backprop: Count | None = Field(
        default=None, description="only this many last recurrences carry gradient (default: all)"
    )
    backprop_schedule: Literal["constant", "linear", "1-sqrt", "steps"] = Field(
        default="constant", description="growth of backprop, as schedule is of the mean"
    )
    backprop_ramp: Fraction | None = Field(default=None, description="as ramp, of backprop")
    backprop_levels: Levels | None = Field(default=None, description="as levels, of backprop")
    capacity_warmup: Fraction | None = Field(
        default=None,
        description="share of the steps in which the capacities of an expert-choice router fall from 1 along a cosine",
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

    def unused(self) -> Iterator[Unused]:
        if self.sampler == "fixed":
            for name in ("min", "max"):
                yield Unused(name, ("sampler",), "it bounds a sampled R, and recurrence.sampler=fixed samples none")
        for prefix, end in (("", "mean"), ("backprop_", "backprop")):
            schedule = getattr(self, prefix + "schedule")
            switches = (f"{prefix}schedule", f"{prefix}levels")
            if schedule in ("constant", "steps"):
                why = f"it belongs to recurrence.{prefix}schedule=linear or 1-sqrt, not to {schedule}"
                yield Unused(f"{prefix}ramp", switches, why)
            if schedule == "steps":
                yield Unused(end, switches, f"recurrence.{prefix}levels says all values")
            else:
                why = f"it belongs to recurrence.{prefix}schedule=steps, not to {schedule}"
                yield Unused(f"{prefix}levels", switches, why)
        if self.backprop is None and self.backprop_levels is None:
            yield Unused("backprop_schedule", ("backprop",), "recurrence.backprop is not set: all carry gradient")


ROLES = (
    "embeddings", "head", "norms", "prelude", "core", "coda", "injection", "lora", "router", "gate", "adapters",
)  # fmt: skip
Role = Literal[
    "embeddings", "head", "norms", "prelude", "core", "coda", "injection", "lora", "router", "gate", "adapters"
]
Roles = Annotated[list[Role], AfterValidator(_once)]


class Optimiser(Section):
    """The optimiser, what it trains, and the course of its learning rate."""

    kind: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="adamw, or muon for matrices of layers and injection, AdamW for the rest",
    )
    train: Roles | None = Field(
        default=None,
        min_length=1,
        description="roles of the parameters that learn, all others are frozen (default: all): " + ", ".join(ROLES),
    )
    multipliers: dict[Role, Annotated[Number, Field(ge=0)]] | None = Field(
        default=None, description="factors on the learning rate by role, as {embeddings: 0.1}"
    )
    learning_rate: Number = Field(default=1e-4, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine",
        description="after warm-up: cosine, linear (both to 0), constant, or wsd (constant, then linear to 0)",
    )
    warmup: Fraction = Field(default=0.01, description="share of the steps spent in linear warm-up")
    cooldown: Fraction | None = Field(
        default=None, description=f"share of the steps in wsd's final decay (default: {COOLDOWN})"
    )
    weight_decay: Number = Field(default=0.01, ge=0, description="decoupled weight decay; norms and biases have none")
    betas: Pair = Field(default=(0.9, 0.95), description="AdamW's betas")
    clip: Number = Field(default=1.0, ge=0, description="gradient norm to clip at (0: never)")
    muon_learning_rate: Number = Field(default=1e-3, gt=0, description="peak learning rate of Muon")
    muon_momentum: Number = Field(default=0.95, ge=0, lt=1, description="of Muon")
    muon_adjust: Literal["original", "match_rms_adamw"] = Field(
        default="original",
        description="Muon's learning rate by a matrix's shape: original, match_rms_adamw",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Optimiser:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas[0]},{self.betas[1]}: each at least 0 and below 1")
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup={self.warmup} and cooldown={self.decay} together exceed the run")
        return self

    def unused(self) -> Iterator[Unused]:
        if self.schedule != "wsd":
            why = f"it belongs to optimiser.schedule=wsd, not to {self.schedule}"
            yield Unused("cooldown", ("schedule",), why)
        if self.kind != "muon":
            for name in ("muon_learning_rate", "muon_momentum", "muon_adjust"):
                yield Unused(name, ("kind",), f"it belongs to optimiser.kind=muon, not to {self.kind}")

    @property
    def decay(self) -> float:
        """Share of the steps in wsd's final decay."""
        if self.schedule != "wsd":
            return 0.0
        return COOLDOWN if self.cooldown is None else self.cooldown


class Adapters(Section):
    """PEFT's LoRA adapters: trained instead of the model's own weights, and merged into them at the end."""

    rank: Count = Field(default=8, description="rank of the adapters")
    alpha: Number | None = Field(default=None, gt=0, description="their scale is alpha / rank (default: alpha = rank)")
    dropout: Number = Field(default=0.0, ge=0, lt=1, description="on their input")
    targets: Names | None = Field(
        default=None, min_length=1, description="names of linear modules (default: all of the layers)"
    )


Checkpointing = Annotated[
    Literal["none", "layer", "recurrence"],
    BeforeValidator(lambda value: {"true": "layer", "false": "none"}.get(str(value).lower(), value)),
]


class Train(Section):
    """A training run."""

    data: Data
    recurrence: Recurrence | None = None
    objectives: Objectives = Objectives()
    adapters: Adapters | None = None
    optimiser: Optimiser = Optimiser()
    revision: str | None = Field(default=None, description="revision of MODEL when it is a hub id")
    steps: Count | None = Field(default=None, description="optimiser steps (default: from epochs)")
    epochs: Number | None = Field(
        default=None,
        gt=0,
        description="passes over the data, where steps is not given (default: 1)",
    )
    batch_size: Count = Field(default=8, description="blocks in a micro-batch, on each process")
    gradient_accumulation: Count = Field(default=1, description="micro-batches a step, on each process")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the computation: float32, or bfloat16 autocast; weights train in float32"
    )
    gradient_checkpointing: Checkpointing = Field(
        default="none",
        description="recompute activations in the backward pass: none, layer (keeps the input of every layer) or "
        "recurrence (keeps the state before every recurrence; the layers of prelude and coda as in layer)",
    )
    compile: Literal["none", "layer"] = Field(
        default="none", description="compile the layers with torch.compile: none or layer"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="of the final weights (default: as MODEL stores them)"
    )
    seed: Integer = Field(default=0, ge=0, lt=2**32, description="of data order, recurrences and dropout")
    log_every: Count = Field(default=10, description="steps between log lines")
    save_every: Count | None = Field(default=None, description="steps between checkpoints (default: none)")
    keep_checkpoints: Count = Field(default=2, description="newest checkpoints that are kept")
    eval_every: Count | None = Field(default=None, description="steps between held-out evaluations (default: none)")
    report_to: Names = Field(default=[], description="trackers of transformers: tensorboard, wandb, trackio, ...")

    @model_validator(mode="after")
    def _consistent(self) -> Train:
        if self.steps and self.epochs:
            raise ValueError("steps and epochs are two ways to set the length of the run: give one")
        if self.data.streaming and not self.steps:
            raise ValueError("a streamed source has no known length: set steps")
        if self.data.streaming and self.objectives.distillation and self.objectives.distillation.top_k:
            raise ValueError(
                "distillation.top_k computes the teacher before training, streaming reads the text then: drop one"
            )
        return self

    def unused(self) -> Iterator[Unused]:
        if not self.data.held_out:
            why = "there is no held-out text; set data.eval or data.eval_fraction"
            yield Unused("eval_every", ("data.eval", "data.eval_fraction"), why)
            if self.recurrence:
                yield Unused("recurrence.eval_at", ("data.eval", "data.eval_fraction"), why)
        if self.objectives.exit_gate and self.objectives.exit_gate.stage == "gate" and self.optimiser.train != ["gate"]:
            why = "with objectives.exit_gate.stage=gate only the gate learns"
            yield Unused("optimiser.train", ("objectives.exit_gate.stage",), why)


class Evaluate(Section):
    """A measurement of held-out loss and of answers."""

    data: Strings = Field(min_length=1, description="source or list of sources, as data.train of loopwise train")
    eval_fraction: Fraction = Field(
        default=0.0,
        lt=0.5,
        description="measure only on the share that a training run with this data.eval_fraction holds out",
    )
    text_field: str = Field(default="text", description="field of a record that holds the text (jsonl, datasets)")
    chat_field: str | None = Field(
        default=None,
        description="field that holds a conversation, instead of text_field: each is measured by itself, and only what "
        "the assistant says; generated tasks need no such field",
    )
    group: str | None = Field(
        default=None,
        description="field of a conversation's record by which right answers are counted: a value for all its answers, "
        "or a list of one for each, as hops of task:hops",
    )
    split: str = Field(default="train", description="split of a `datasets` source")
    subset: str | None = Field(default=None, description="subset (configuration) of a `datasets` source")
    bad_records: BadRecords = Field(default="stop", description=f"{BAD}: stop, or skip it; it is named either way")
    sequence_length: Integer = Field(
        default=1024, ge=2, description="tokens in a block of text; most tokens of a conversation"
    )
    num_recurrences: Depths | None = Field(
        default=None, min_length=1, description="recurrences to measure at (default: the model's own)"
    )
    limit: Count | None = Field(
        default=None, description="measure at most so many blocks or conversations, evenly spread over the data"
    )
    batch_size: Count = Field(default=8, description="blocks in a batch; with endpoint, requests at once")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="float32, or bfloat16 autocast")
    revision: str | None = Field(default=None, description="revision of MODEL when it is a hub id")
    endpoint: str | None = Field(
        default=None,
        description="a running server of MODEL, as http://127.0.0.1:8000/v1: right answers are those that it gives, "
        "and num_recurrences stands in every request",
    )
    request: dict[str, Any] = Field(
        default={}, description="with endpoint: further fields of every request, as request.exit_rule=cosine"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Evaluate:
        split = tasks.TRAIN if self.eval_fraction else tasks.HELD_OUT
        self.data = [tasks.placed(source, split) for source in self.data]
        generated = [source for source in self.data if tasks.is_task(source)]
        if generated and len(generated) < len(self.data) and self.chat_field is None:
            raise ValueError(f"{generated[0]} asks for answers, and the other data is text: measure them one by one")
        if self.group is not None and not self.asks:
            raise ValueError(f"group={self.group} counts right answers, which text has not: give chat_field")
        if self.endpoint and not self.asks:
            raise ValueError(f"endpoint={self.endpoint} is asked for answers, which text has not: give chat_field")
        if "num_recurrences" in self.request:
            raise ValueError("request.num_recurrences: give num_recurrences, which takes several")
        if wrong := [name for name in self.request if name not in REQUEST]:
            raise ValueError(f"request.{wrong[0]}: choose from {', '.join(REQUEST)}")
        return self

    def unused(self) -> Iterator[Unused]:
        if self.endpoint:
            yield Unused("precision", ("endpoint",), "a server has its own; start it with dtype")
        else:
            yield Unused("request", ("endpoint",), "its fields are a server's, and endpoint names none")

    @property
    def asks(self) -> bool:
        """True where conversations are measured, and not text."""
        return self.chat_field is not None or tasks.is_task(self.data[0])
