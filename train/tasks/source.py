"""A generated task as a data source: `task:hops?hops=1..8&seed=3`.

A record is a conversation in `messages` whose answers are learned, with more fields about its questions. It is a
function of the source's text and the record's number alone: no machine, rank, order or Python release takes part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loopwise.errors import UserError, unknown

from .parameters import Draws, Parameter, choice, integer
from .registry import TASKS

PREFIX = "task:"
MESSAGES = "messages"  # the field that holds a record's conversation
TRAIN, HELD_OUT = "train", "held-out"
RECORDS = {TRAIN: 60_000, HELD_OUT: 2000}
HELD_OUT_SHARE = 1 / 8  # share of all problems
TRIES = 2000  # of a record; fewer suffice unless a split has no problem of the asked kind

COMMON = {
    "records": Parameter(integer(1), None, "records of the source (default: 60000, held out 2000)"),
    "seed": Parameter(integer(0), 0, "seed of the records"),
    "split": Parameter(
        choice(TRAIN, HELD_OUT), None, "train or held-out, which share no problem (default: by where the source stands)"
    ),
}


@dataclass(frozen=True)
class Source:
    """A validated source. values: of all parameters; `split` is None if the source does not name it."""

    name: str
    values: dict[str, Any]

    def record(self, number: int) -> dict[str, Any]:
        """Record `number`, counted from 0.

        The hash of a problem decides its split, so that no seed or parameter moves a problem into the other split.
        Raises UserError if the split has no problem of this kind.
        """
        split = self.values["split"] or TRAIN
        task = TASKS[self.name]
        drawn = (name for name, p in task.parameters.items() if not p.later or self.values[name] != p.default)
        keys = {name: self.values[name] for name in (*sorted(drawn), "seed")}
        draws = Draws(json.dumps([self.name, keys, split, number]))
        for _ in range(TRIES):
            problem, record = task.draw(self.values, draws, number)
            if _held_out(problem) == (split == HELD_OUT):
                return record
        raise UserError(
            f"{PREFIX}{self.name}: {TRIES} draws gave no {split} problem; ask for longer or more varied ones"
        )

    def guess(self, record: dict[str, Any]) -> list[float] | None:
        """The probability that a guess answers each question of `record`; None where no simple one is known."""
        guess = TASKS[self.name].guess
        return guess(self.values, record) if guess else None

    def records(self) -> Iterator[dict[str, Any]]:
        """All records in order."""
        return map(self.record, range(self.values["records"]))


def _held_out(problem: str) -> bool:
    digest = hashlib.blake2b(problem.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < HELD_OUT_SHARE * 2**32


def is_task(source: str) -> bool:
    """True if `source` names a generated task."""
    return source.startswith(PREFIX)


def name_of(source: str) -> str:
    """The task that `source` names."""
    return source.removeprefix(PREFIX).partition("?")[0]


def parse(source: str) -> Source:
    """The source `task:NAME?parameter=value&...`. Raises UserError with the parameter, its rule and the choices."""
    name, _, text = source.removeprefix(PREFIX).partition("?")
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    known = {**TASKS[name].parameters, **COMMON}
    values = {key: parameter.default for key, parameter in known.items()}
    given: set[str] = set()
    for setting in filter(None, text.split("&")):
        key, _, value = setting.partition("=")
        if key not in known:
            raise unknown(f"parameter of {PREFIX}{name}", key, known, few=len(known))
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
    """`source` with `split`, if it is a generated task that names none; any other source unchanged.

    Raises UserError for a wrong source, and for a held-out one where `split` is the training split.
    """
    if not is_task(source):
        return source
    named = parse(source).values["split"]
    if named == HELD_OUT and split == TRAIN:
        raise UserError(f"{source}: held-out problems are not trained on; split={HELD_OUT} is for data.eval and eval")
    return source if named else f"{source}{'&' if '?' in source else '?'}split={split}"


class Rows:
    """The records as a resumable stream, with the methods of a `datasets` stream."""

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
