"""The section `data`: sources of text, and their packing into blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from loopwise.errors import shorten
from loopwise.recipe import Count, Integer, Number, Section
from loopwise.unused import Unused

from .. import tasks
from .fields import BAD, BadRecords, Fraction, HeldOutSources, Table, TrainingSources
from .recurrence import PhaseRecurrence


class Phase(Section):
    """A part of the run with its own mixture of sources."""

    share: Number = Field(gt=0, le=1, description="share of the run's steps")
    sources: Annotated[
        dict[str, Annotated[Number, Field(gt=0)]],
        AfterValidator(lambda given: {tasks.placed(source, tasks.TRAIN): weight for source, weight in given.items()}),
    ] = Field(min_length=1, description="{source: weight}")
    recurrence: PhaseRecurrence | None = Field(
        default=None, description="recurrences of this phase: mean, sampler, min, max and backprop replace recurrence.*"
    )

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Phases without recurrences are written as earlier releases wrote them."""
        return {key: value for key, value in dump(self).items() if key != "recurrence" or value is not None}


class RecordRecurrences(Section):
    """R by record, where a record has a field for its difficulty. Others have R of the step."""

    field: str = Field(description="field of a record; of a list, the item with the greatest R counts")
    table: Table = Field(description="{value of the field: mean recurrences}, as {1: 2, 2: 3}")

    def of(self, record: dict[str, Any]) -> int:
        """The mean R of a record, 0 without the field. Raises ValueError for a value that the table lacks."""
        value = record.get(self.field)
        values = [str(x) for x in (value if isinstance(value, list) else [] if value is None else [value])]
        if unknown := next((x for x in values if x not in self.table), None):
            known = shorten(", ".join(self.table), 100)
            raise ValueError(f"field {self.field!r} is {unknown!r}; data.recurrences.table has {known}")
        return max((self.table[x] for x in values), default=0)


class Data(Section):
    """The text, and its packing into blocks."""

    train: TrainingSources = Field(
        default=[],
        description="source or list of sources: a .jsonl, .parquet or text file, a directory or glob of such files, "
        "a `datasets` hub id or saved directory, or a generated task as task:hops?hops=1..8",
    )
    phases: list[Phase] | None = Field(
        default=None,
        min_length=1,
        description="replaces train: a list of {share: of the run, sources: {source: weight}}, in order; the shares "
        "sum to 1. A phase may have recurrences of its own, as recurrence: {mean: 4, max: 8}",
    )
    eval: HeldOutSources | None = Field(default=None, description="held-out source or sources")
    eval_fraction: Fraction = Field(
        default=0.0,
        lt=0.5,
        description="held-out share of data.train, split off by document; without data.eval",
    )
    group: str | None = Field(
        default=None,
        description="field of a held-out record by which right answers are grouped, as in loopwise eval",
    )
    streaming: bool | TrainingSources = Field(
        default=False,
        description="training sources that are read during training, not before it: true for all, or a list of them",
    )
    window: Count = Field(
        default=1000,
        description="documents of a streamed source that are packed together, and whose blocks are shuffled together",
    )
    text_field: str = Field(default="text", description="field of a record that holds the text (jsonl, datasets)")
    chat_field: str | None = Field(
        default=None,
        description="field with a conversation, a list of {role, content}; replaces text_field. It is rendered with "
        "the chat template, and the loss covers the assistant's tokens only",
    )
    split: str = Field(default="train", description="split of a `datasets` source")
    subset: str | None = Field(default=None, description="subset (configuration) of a `datasets` source")
    recurrences: RecordRecurrences | None = None
    sequence_length: Integer = Field(
        default=1024, ge=2, description="tokens in a block; documents are joined by EOS and packed"
    )
    packing_strategy: Literal["wrapped", "bfd", "bfd_split"] = Field(
        default="wrapped",
        description="documents in blocks, by TRL's names: wrapped (cut at block ends), bfd (whole, by best-fit "
        "decreasing, with padding; of a document longer than a block, the beginning), bfd_split (likewise; a longer "
        "document goes on in other blocks)",
    )
    long_documents: Literal["cut", "stop", "skip"] = Field(
        default="cut",
        description="with bfd and bfd_split, a document longer than a block: cut it, stop the run, or skip it",
    )
    separate_documents: bool = Field(
        default=False, description="mask attention between the documents that are packed into one block"
    )
    bad_records: BadRecords = Field(default="stop", description=f"{BAD}: stop the run, or skip it; both name it")
    cache: str | None = Field(default=None, description="directory that keeps the tokens of local files for later runs")

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if bool(self.train) == bool(self.phases):
            raise ValueError("train and phases both name the text: give one")
        if self.phases and abs(sum(phase.share for phase in self.phases) - 1) > 1e-6:
            raise ValueError(f"the shares of phases sum to {sum(phase.share for phase in self.phases):g}, not to 1")
        if self.eval and self.eval_fraction:
            raise ValueError("eval and eval_fraction both name held-out text: give one")
        if self.streaming and self.eval_fraction:
            raise ValueError(
                "eval_fraction splits text before training, but streaming reads it during training: use eval"
            )
        if self.group is not None and self.held_out and not self.measures_answers:
            raise ValueError(f"group={self.group} groups right answers, and text has none: give chat_field")
        names = [name for part in self.parts() for name in part]
        for name in self.streaming if isinstance(self.streaming, list) else []:
            if name not in names:
                raise ValueError(f"streaming: {name!r} is not among the training sources {', '.join(map(repr, names))}")
        for part, streamed in zip(self.parts(), self.streamed(), strict=True):
            if streamed and isinstance(self.streaming, list) and set(part) - set(self.streaming):
                raise ValueError("streaming: to mix streamed with other sources, name them in phases, with weights")
        return self

    def unused(self) -> Iterator[Unused]:
        if not self.streaming:
            yield Unused("window", ("streaming",), "only streamed sources have a window, and data.streaming names none")
        if self.chat_field is not None:
            why = f"data.chat_field={self.chat_field} replaces it; give one of the two"
            yield Unused("text_field", ("chat_field",), why)
        if not self.held_out:
            why = "it groups right answers of held-out data; set data.eval or data.eval_fraction"
            yield Unused("group", ("eval", "eval_fraction"), why)
        if not self.padded:
            yield Unused("long_documents", ("packing_strategy",), "packing_strategy=wrapped cuts all documents")
        if all(self.streamed()):
            yield Unused(
                "cache", ("streaming",), "it keeps the tokens of sources that are not streamed, and all are streamed"
            )

    @property
    def field(self) -> str:
        """The field of a record that is read."""
        return self.chat_field or self.text_field

    def names(self) -> list[str]:
        """The sources of `phases`, each once."""
        return list(dict.fromkeys(name for phase in self.phases or [] for name in phase.sources))

    def parts(self) -> list[list[str]]:
        """The groups of sources that are mixed by weight: `train` as one group, or one group for each of `names`."""
        return [[name] for name in self.names()] or [self.train]

    def streamed(self) -> list[bool]:
        """True for each of `parts` that is read during training."""
        named = self.streaming if isinstance(self.streaming, list) else None
        return [bool(self.streaming) if named is None else bool({*part} & {*named}) for part in self.parts()]

    def mixture(self) -> list[tuple[float, list[float]]]:
        """(share of the run, weight of each of `parts`) of every phase."""
        if not self.phases:
            return [(1.0, [1.0])]
        return [(phase.share, [phase.sources.get(name, 0.0) for name in self.names()]) for phase in self.phases]

    def recurrence_by_phase(self) -> list[tuple[float, PhaseRecurrence | None]]:
        """(share of the run, `recurrence`) of every phase."""
        return [(phase.share, phase.recurrence) for phase in self.phases or []] or [(1.0, None)]

    @property
    def padded(self) -> bool:
        """True if documents stay whole, and blocks are padded."""
        return self.packing_strategy != "wrapped"

    @property
    def measures_answers(self) -> bool:
        """True if some held-out data are conversations, whose right answers are counted."""
        sources = self.eval or [name for part in self.parts() for name in part]
        return self.held_out and (self.chat_field is not None or any(map(tasks.is_task, sources)))

    @property
    def held_out(self) -> bool:
        """True if the recipe names held-out text."""
        return bool(self.eval or self.eval_fraction)
