"""The recipe of `loopwise eval`."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Strict, model_validator

from ..deprecated import SERVING, rename
from ..exit_rules import ExitRule
from ..recipe import Count, Integer, Section
from ..train import tasks
from ..train.recipe.fields import BAD, BadRecords, Depths, Fraction, Names, Strings, once
from ..unused import Unused

# Request fields that change a server's depth. `loopwise eval` sets all other fields itself.
REQUEST = (
    "min_recurrences", "exit_rule", "exit_threshold", "prompt_exit", "decoder", "max_in_flight", "draft_every",
    "draft_depths", "diffusion",
)  # fmt: skip
Rules = Annotated[list[Literal["all", ExitRule]], AfterValidator(once)]


# Keys that describe `data`, and those that belong to `tasks`.
DATA_KEYS = (
    "eval_fraction", "text_field", "chat_field", "group", "split", "subset", "bad_records", "sequence_length",
)  # fmt: skip
TASK_KEYS = (
    "baseline", "baseline_revision", "num_fewshot", "apply_chat_template", "system_instruction", "gen_kwargs",
    "log_samples",
)  # fmt: skip


class Evaluate(Section):
    """A measurement of held-out loss and of answers (`data`), or of scores of lm-eval's tasks (`tasks`)."""

    data: Strings = Field(default=[], description="source or list of sources, like data.train of loopwise train")
    tasks: Names = Field(
        default=[],
        description="in place of data: names of lm-eval's tasks, and files of your own: a .jsonl of question and "
        "answer, or a .yaml that describes one",
    )
    eval_fraction: Fraction = Field(
        default=0.0,
        lt=0.5,
        description="measure only the share that a training run with this data.eval_fraction holds out",
    )
    text_field: str = Field(default="text", description="field of a record that holds the text (jsonl, datasets)")
    chat_field: str | None = Field(
        default=None,
        description="field with a conversation; replaces text_field. Each conversation is a sequence of its own, and "
        "only the assistant's tokens count. Generated tasks do not need it",
    )
    group: str | None = Field(
        default=None,
        description="field of the record by which right answers are grouped: one value for all answers, or a list with "
        "one value for each, like hops of task:hops",
    )
    split: str = Field(default="train", description="split of a `datasets` source")
    subset: str | None = Field(default=None, description="subset (configuration) of a `datasets` source")
    bad_records: BadRecords = Field(default="stop", description=f"{BAD}: stop, or skip it; both name it")
    sequence_length: Integer = Field(
        default=1024, ge=2, description="tokens in a block of text; longest conversation in tokens"
    )
    num_recurrences: Depths | None = Field(
        default=None, min_length=1, description="recurrences to measure at (default: the model's own)"
    )
    limit: Count | None = Field(
        default=None,
        description="most blocks or conversations to measure, evenly spread over the data; of a generated task, the "
        "first records; with tasks, the first questions of each, as in lm-eval",
    )
    batch_size: Count = Field(
        default=8, description="blocks in a batch; with endpoint or engine=lanes, requests at once"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="float32, or bfloat16 autocast; with tasks, the type of the weights"
    )
    revision: str | None = Field(default=None, description="revision of MODEL when it is a hub id")
    router_inference: Literal["threshold", "topk"] | None = Field(
        default=None,
        description="with data: how an expert-choice router takes tokens: threshold, as it is served, or topk, the "
        "best of the whole sequence (default: the model's own)",
    )
    endpoint: str | None = Field(
        default=None,
        description="URL of a running server of MODEL, as http://127.0.0.1:8000/v1: its answers are measured, and "
        "every request carries num_recurrences",
    )
    request: dict[str, Any] = Field(
        default={},
        description="with endpoint or engine=lanes: more fields of every request, as request.exit_rule=cosine",
    )
    engine: Literal["transformers", "lanes"] = Field(
        default="transformers",
        description="what answers: transformers, or the lane engine of loopwise generate, which also measures depths "
        "and tokens per second. With tasks, log-likelihoods are always transformers'",
    )
    baseline: str | None = Field(
        default=None, description="with tasks: a plain model, as the source, that is measured once beside MODEL"
    )
    baseline_revision: str | None = Field(default=None, description="revision of the baseline when it is a hub id")
    num_fewshot: Annotated[int, Strict(), Field(ge=0)] | None = Field(
        default=None, description="with tasks: solved examples before each question (default: the task's own)"
    )
    apply_chat_template: bool = Field(default=False, description="with tasks: ask in the tokenizer's chat template")
    system_instruction: str | None = Field(default=None, description="with tasks: a system message before each prompt")
    gen_kwargs: dict[str, Any] = Field(
        default={},
        description="with tasks: changes of a task's generation_kwargs, as gen_kwargs.max_gen_toks=64",
    )
    log_samples: bool = Field(
        default=False, description="with tasks: keep each question's prompt, target, response and score in the result"
    )
    exit_sweep: Rules | None = Field(
        default=None,
        min_length=1,
        description="exit rules to measure along their thresholds, or all: loss, right answers and mean depth, as the "
        "engine decodes. num_recurrences are fixed depths beside them; the greatest is the depth of the rules",
    )
    thresholds: Count = Field(
        default=8, description="with exit_sweep: thresholds of each rule; their mean depths are spread"
    )
    kv_policy: str | None = Field(
        default=None, description="with exit_sweep, or data and engine=lanes: KV policy (default: the model's own)"
    )
    min_recurrences: Count | None = Field(
        default=None, description="with exit_sweep: recurrences before a rule may fire (default: the model's own, or 1)"
    )
    prompt_exit: bool = Field(default=False, description="with exit_sweep: rules end positions of the prompt, too")

    @model_validator(mode="after")
    def _consistent(self) -> Evaluate:
        if bool(self.data) == bool(self.tasks):
            raise ValueError(
                "give data=..., to measure a loss, or tasks=..., for scores" + "; not both" * bool(self.data)
            )
        split = tasks.TRAIN if self.eval_fraction else tasks.HELD_OUT
        self.data = [tasks.placed(source, split) for source in self.data]
        generated = [source for source in self.data if tasks.is_task(source)]
        if generated and len(generated) < len(self.data) and self.chat_field is None:
            raise ValueError(f"{generated[0]} has answers, and the other data is text: measure them one by one")
        if self.group is not None and not self.tasks and not self.has_answers:
            raise ValueError(f"group={self.group} groups right answers, and text has none: give chat_field")
        if self.endpoint and not self.tasks and not self.has_answers:
            raise ValueError(f"endpoint={self.endpoint} measures answers, and text has none: give chat_field")
        if self.engine == "lanes" and not self.tasks and not self.has_answers:
            raise ValueError("engine=lanes generates answers, and text has none: give chat_field")
        if "fixed" in (self.exit_sweep or []):
            raise ValueError("exit_sweep=fixed: every sweep has fixed depths (num_recurrences); name a rule that exits")
        if self.endpoint and self.exit_sweep:
            raise ValueError(f"endpoint={self.endpoint} measures at fixed settings: leave endpoint or exit_sweep out")
        if "num_recurrences" in self.request:
            raise ValueError("request.num_recurrences: give num_recurrences, which takes several")
        if self.request:  # an assignment counts as given
            self.request = rename(self.request, SERVING, REQUEST, "request field")
        if wrong := [name for name in self.request if name not in REQUEST]:
            raise ValueError(f"request.{wrong[0]}: choose from {', '.join(REQUEST)}")
        return self

    def unused(self) -> Iterator[Unused]:
        for key in DATA_KEYS if self.tasks else TASK_KEYS:
            yield Unused(key, ("tasks",), "tasks have their own data" if self.tasks else "it belongs to tasks=...")
        if self.endpoint:
            yield Unused("precision", ("endpoint",), "the server sets its own precision; start it with dtype")
            yield Unused("engine", ("endpoint",), "the server at endpoint generates")
            yield Unused("router_inference", ("endpoint",), "the server routes as its model's config says")
        elif self.engine != "lanes":
            why = "its fields are sent to a server, and endpoint names none; engine=lanes takes them, too"
            yield Unused("request", ("endpoint", "engine"), why)
        if self.tasks:
            if not self.baseline:
                yield Unused("baseline_revision", ("baseline",), "there is no baseline")
            yield Unused("exit_sweep", ("tasks",), "it measures data; tasks take engine=lanes request.exit_rule=...")
            yield Unused("router_inference", ("tasks",), "it belongs to data=...")
        if self.exit_sweep:
            yield Unused("engine", ("exit_sweep",), "exit_sweep decodes in the lane engine, and takes no engine")
        else:
            yield from self._only_with_sweep()

    def _only_with_sweep(self) -> Iterator[Unused]:
        why = "it sets how exit_sweep decodes, which names no rule"
        for name in ("thresholds", "min_recurrences", "prompt_exit"):
            yield Unused(name, ("exit_sweep",), why)
        if self.tasks or self.endpoint or self.engine != "lanes":
            yield Unused("kv_policy", ("exit_sweep", "engine"), f"{why}, and engine=lanes does not answer data")

    @property
    def has_answers(self) -> bool:
        """True if conversations are measured, not text."""
        return self.chat_field is not None or any(map(tasks.is_task, self.data))


def as_eval(name: str) -> Any:
    """The key `name` of `loopwise eval`, for another recipe that has it too."""
    return copy(Evaluate.model_fields[name])
