"""The recipe of `loopwise search`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Strict, model_validator

from ...recipe import Count, Integer, Number, Section
from ...train import tasks
from ...train.recipe.fields import BadRecords, Fraction, Names, Strings, once
from ...unused import Unused
from ..recipe import DATA_KEYS, Evaluate, as_eval

WAYS = ("skip", "repeat", "damped", "half-steps")
Ways = Annotated[list[Literal["skip", "repeat", "damped", "half-steps"]], AfterValidator(once)]
Sizes = Annotated[list[Count], AfterValidator(once)]
TASK_KEYS = ("num_fewshot", "apply_chat_template", "system_instruction", "gen_kwargs")
OF_KIND = {
    "scan": ("sizes", "stride", "ways"),
    "chains": ("simulations", "longest", "exploration", "length_penalty", "random_share", "search_for", "seed"),
}


class Search(Section):
    """A search for layers of a plain model to skip, repeat or run in smaller steps."""

    data: Strings = Field(default=[], description="source or list of sources to choose on, like data of loopwise eval")
    tasks: Names = Field(default=[], description="in place of data: tasks to choose on, like tasks of loopwise eval")
    check: Strings = Field(
        default=[], description="with data: more sources; on each, the best program is compared with the source"
    )
    kind: Literal["scan", "chains"] = Field(
        default="scan",
        description="scan: every block of layers, in several ways; chains: Monte-Carlo tree search over chains of "
        "skipped and repeated layers (CoLa, arXiv 2507.07996), for which data need answers",
    )
    sizes: Sizes = Field(default=[1, 2, 4, 6], min_length=1, description="scan: layers of a block")
    stride: Count = Field(default=1, description="scan: layers between the starts of two blocks")
    ways: Ways = Field(
        default=[*WAYS],
        min_length=1,
        description="scan: skip a block; repeat it; repeat it with recurrence_damping=0.5; run it in two half steps "
        "(recurrence_damping=1/R)",
    )
    simulations: Count = Field(default=100, description="chains: programs that a search tries")
    longest: Count = Field(default=2, description="chains: most layers that a move skips or repeats")
    exploration: Number = Field(default=1.8, ge=0, description="chains: weight of exploration in the UCB score")
    length_penalty: Number = Field(
        default=3.0, ge=0, description="chains: weight of a chain's length over the source's in the UCB score"
    )
    random_share: Annotated[Number, Field(le=1)] = Field(
        default=0.1, ge=0, description="chains: share of the steps down the tree that are drawn at random"
    )
    search_for: Literal["each", "all", "both"] = Field(
        default="both", description="chains: a chain for each question, one for all of them, or both"
    )
    seed: Annotated[int, Strict(), Field(ge=0)] = Field(default=0, description="chains: seed of the draws")
    eval_fraction: Fraction = as_eval("eval_fraction")
    text_field: str = as_eval("text_field")
    chat_field: str | None = as_eval("chat_field")
    group: str | None = as_eval("group")
    split: str = as_eval("split")
    subset: str | None = as_eval("subset")
    bad_records: BadRecords = as_eval("bad_records")
    sequence_length: Integer = as_eval("sequence_length")
    limit: Count | None = as_eval("limit")
    batch_size: Count = Field(default=8, description="blocks, conversations or requests in a batch")
    num_fewshot: Annotated[int, Strict(), Field(ge=0)] | None = as_eval("num_fewshot")
    apply_chat_template: bool = as_eval("apply_chat_template")
    system_instruction: str | None = as_eval("system_instruction")
    gen_kwargs: dict[str, Any] = as_eval("gen_kwargs")
    revision: str | None = as_eval("revision")

    @model_validator(mode="after")
    def _consistent(self) -> Search:
        if bool(self.data) == bool(self.tasks):
            raise ValueError("give data=... or tasks=..., to choose on" + "; not both" * bool(self.data))
        if self.tasks and self.check:
            raise ValueError("check compares on data: with tasks, save the best program and run loopwise eval on it")
        self.asked(self.data or None)
        if self.kind == "chains" and self.data and not self.asked(self.data).has_answers:
            raise ValueError("kind=chains looks for right answers, and text has none: give chat_field, or kind=scan")
        return self

    def asked(self, sources: list[str] | None) -> Evaluate:
        """The measurement of `sources`, or of the tasks (None)."""
        keys = [*DATA_KEYS, "data"] if sources else [*TASK_KEYS, "tasks"]
        given = {name: getattr(self, name) for name in keys if name in self.model_fields_set and name != "data"}
        common = {name: getattr(self, name) for name in ("limit", "batch_size", "revision")}
        return Evaluate.model_validate({**given, **common, **({"data": sources} if sources else {})})

    def unused(self) -> Iterator[Unused]:
        for key in DATA_KEYS if self.tasks else TASK_KEYS:
            yield Unused(key, ("tasks",), "tasks have their own data" if self.tasks else "it belongs to tasks=...")
        other = "chains" if self.kind == "scan" else "scan"
        for key in OF_KIND[other]:
            yield Unused(key, ("kind",), f"it belongs to kind={other}")

    @property
    def has_answers(self) -> bool:
        """True if the data have answers, or are tasks."""
        return bool(self.tasks) or self.chat_field is not None or any(map(tasks.is_task, self.data))
