"""Generated tasks as data sources: `task:hops?hops=1..8&seed=3`, records that nobody has to store.

A record is a conversation in `messages`, of which the answers are learned, with fields that say what was asked. It is a
function of the source's text and its number alone: of no machine, rank, order or release of Python. No torch here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from loopwise.errors import UserError, unknown

from . import hops
from .parameters import Draws, Parameter, choice, integer

PREFIX = "task:"
MESSAGES = "messages"  # the field that holds a record's conversation
TRAIN, HELD_OUT = "train", "held-out"
RECORDS = {TRAIN: 60_000, HELD_OUT: 2000}
HELD_OUT_SHARE = 1 / 8  # of all problems

COMMON = {
    "records": Parameter(integer(1), None, "records of the source (default: 60000, held out 2000)"),
    "seed": Parameter(integer(0), 0, "another seed, other records"),
    "split": Parameter(
        choice(TRAIN, HELD_OUT), None, "train or held-out, which share no problem (default: by where the source stands)"
    ),
}

CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Task:
    """A kind of problem.

    parameters: by name.   settle: works out what depends on other parameters; raises ValueError.   draw: (problem,
    record) of the settled parameters, `Draws` and the record's number.   vocabulary: tokens, a character each.
    silent: characters without a token.
    """

    parameters: dict[str, Parameter]
    settle: Callable[[dict[str, Any]], dict[str, Any]]
    draw: Callable[[dict[str, Any], Draws, int], tuple[str, dict[str, Any]]]
    vocabulary: tuple[str, ...]
    silent: str


TASKS = {"hops": Task(hops.PARAMETERS, hops.settle, hops.draw, hops.VOCABULARY, hops.SILENT)}


@dataclass(frozen=True)
class Source:
    """A checked source. values: of all parameters; split None where it is not said."""

    name: str
    values: dict[str, Any]

    def record(self, number: int) -> dict[str, Any]:
        """Record `number`, counted from 0. The hash of a problem says to which split it belongs, so that no seed or
        parameter brings a problem of one split into the other."""
        split = self.values["split"] or TRAIN
        task = TASKS[self.name]
        own = {name: self.values[name] for name in (*sorted(task.parameters), "seed")}
        draws = Draws(json.dumps([self.name, own, split, number]))
        while True:
            problem, record = task.draw(self.values, draws, number)
            if _held_out(problem) == (split == HELD_OUT):
                return record

    def records(self) -> Iterator[dict[str, Any]]:
        return map(self.record, range(self.values["records"]))


def _held_out(problem: str) -> bool:
    digest = hashlib.blake2b(problem.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < HELD_OUT_SHARE * 2**32


def is_task(source: str) -> bool:
    return source.startswith(PREFIX)


def parse(source: str) -> Source:
    """A source `task:NAME?parameter=value&...`. Raises UserError that names the parameter, its rule and the choices."""
    name, _, text = source.removeprefix(PREFIX).partition("?")
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    known = {**TASKS[name].parameters, **COMMON}
    values = {key: parameter.default for key, parameter in known.items()}
    given: set[str] = set()
    for setting in filter(None, text.split("&")):
        key, _, value = setting.partition("=")
        if key not in known:
            raise unknown(f"parameter of {PREFIX}{name}", key, known)
        if key in given:
            raise UserError(f"{source}: {key} is given twice")
        given.add(key)
        try:
            values[key] = known[key].read(value)
        except ValueError as error:
            raise UserError(f"{source}: {key}={value}: {error}") from None
    values["records"] = values["records"] or RECORDS[values["split"] or TRAIN]
    try:
        return Source(name, TASKS[name].settle(values))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def placed(source: str, split: str) -> str:
    """A task's source with the `split` of the place where it stands, unless it names one itself; others as they are.

    Raises UserError for a source that is wrong, or held out where `split` is to be trained on.
    """
    if not is_task(source):
        return source
    own = parse(source).values["split"]
    if own == HELD_OUT and split == TRAIN:
        raise UserError(f"{source}: what is held out is not trained on; split={HELD_OUT} is for data.eval and eval")
    return source if own else f"{source}{'&' if '?' in source else '?'}split={split}"


class Rows:
    """The records as a stream that goes on where its state says, as a `datasets` stream does."""

    def __init__(self, source: str):
        self.source, self.number = parse(source), 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.number < self.source.values["records"]:
            self.number += 1
            yield self.source.record(self.number - 1)

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def tokenizer(name: str) -> Any:
    """A tokenizer of the task's characters, with its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    task = TASKS[name]
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<unk>", *task.vocabulary])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters = pre_tokenizers.Split("", "isolated")
    silent = [pre_tokenizers.Split(c, "removed") for c in task.silent]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*silent, characters])
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", chat_template=CHAT)
