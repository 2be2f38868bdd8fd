"""Types of recipe values that several sections share."""

from __future__ import annotations

import itertools
import os
import re
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from loopwise.recipe import Count, Counts, Number

from .. import tasks

T = TypeVar("T")


def _named(values: list[str]) -> list[str]:
    if "" in values:
        raise ValueError("an empty name; the empty path would be the current directory")
    for source, rest in itertools.pairwise(values):  # YAML reads task:hops?hops=1,2 as two items
        if tasks.is_task(source) and "=" in source and re.fullmatch(r"[\d.+]+(&.*)?", rest):
            raise ValueError(
                f"{source},{rest}: a comma ends a source; numbers of a task's parameter are joined by +, or a range: "
                "hops=1+2, hops=1..4"
            )
    return values


def once(values: list[T]) -> list[T]:
    """`values` unchanged. Raises ValueError for a value that is given twice."""
    if twice := next((value for value in values if values.count(value) > 1), None):
        raise ValueError(f"{twice} stands twice; once is enough")
    return values


def absolute(source: str) -> str:
    """The absolute path of a local `source`, a file, directory or glob; the `source` itself of the hub, or a task's."""
    path = os.path.expanduser(source)
    local = not tasks.is_task(source) and (os.path.exists(path) or any(character in path for character in "*?["))
    return os.path.realpath(path) if local else source


def _levels(value: object) -> object:
    """{share: number} as a sorted list of pairs, the first at share 0."""
    if not isinstance(value, dict) or not value:
        raise ValueError("a mapping from shares of the run to numbers, as {0: 2, 0.5: 4}")
    try:
        levels = sorted(((float(share), number) for share, number in value.items()), key=lambda level: level[0])
    except (TypeError, ValueError):
        raise ValueError("the keys are shares of the run, numbers from 0 to 1, as {0: 2, 0.5: 4}") from None
    if levels[0][0] != 0:
        raise ValueError("the first share is 0, where the run begins")
    return levels


Strings = Annotated[list[str], AfterValidator(_named)]
Names = Annotated[Strings, AfterValidator(once)]
Depths = Annotated[Counts, AfterValidator(once)]
# Generated tasks get the split of the place where they stand.
TrainingSources = Annotated[
    Strings, AfterValidator(lambda sources: [tasks.placed(source, tasks.TRAIN) for source in sources])
]
HeldOutSources = Annotated[
    Strings, AfterValidator(lambda sources: [tasks.placed(source, tasks.HELD_OUT) for source in sources])
]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Pair = tuple[Number, Number]
Levels = Annotated[
    list[tuple[Fraction, Count]],
    BeforeValidator(_levels, json_schema_input_type=dict[Fraction, Count]),
    PlainSerializer(lambda levels: dict(levels)),
]
DEEPEST = 31  # R of a record, which the marks of tokens hold in five bits
Table = Annotated[
    dict[str, Annotated[Count, Field(le=DEEPEST)]],
    Field(min_length=1),
    BeforeValidator(lambda given: {str(k): v for k, v in given.items()} if isinstance(given, dict) else given),
]
BadRecords = Literal["stop", "skip"]
BAD = "a record without the field it needs, or a named file that is not UTF-8"
