"""Parameters of a generated task, and reproducible draws for its records."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a task's source.

    read: parses the text after `=`; raises ValueError with the rule.   default: the value without that text; a task may
    compute a None from the other parameters.   meaning: for help and docs.   later: added after the task's first
    release. At its default it does not enter the draws, so records of earlier sources stay the same.
    """

    read: Callable[[str], Any]
    default: Any
    meaning: str
    later: bool = False


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from `low` to `high`."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= (int(text) if high is None else high):
            raise ValueError(f"a whole number, {f'at least {low}' if high is None else f'{low} to {high}'}")
        return int(text)

    return read


def numbers(low: int, high: int) -> Callable[[str], tuple[int, ...]]:
    """A reader of sets of whole numbers from `low` to `high`: 4, 1..8, or several of these joined by +."""
    one = integer(low, high)

    def read(text: str) -> tuple[int, ...]:
        found: set[int] = set()
        try:
            for part in text.split("+"):
                first, dots, last = part.partition("..")
                span = range(one(first), one(last if dots else first) + 1)
                if not span:
                    raise ValueError
                found |= {*span}
        except ValueError:
            raise ValueError(
                f"a whole number, a range as 1..8, or several of these joined by +, from {low} to {high}"
            ) from None
        return tuple(sorted(found))

    return read


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError("a number from 0 to 1")
    return value


def choice(*names: str) -> Callable[[str], str]:
    """A reader of one of `names`."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return read


def choices(*names: str) -> Callable[[str], tuple[str, ...]]:
    """A reader of one or several of `names`, joined by +."""

    def read(text: str) -> tuple[str, ...]:
        found = text.split("+")
        if not {*found} <= {*names}:
            raise ValueError(f"one of {', '.join(names)}, or several of these joined by +")
        return tuple(name for name in names if name in found)

    return read


def either(word: str, otherwise: Callable[[str], T]) -> Callable[[str], T | str]:
    """A reader of `word`, or of anything that `otherwise` reads."""

    def read(text: str) -> T | str:
        try:
            return word if text == word else otherwise(text)
        except ValueError as error:
            raise ValueError(f"{word}, or {error}") from None

    return read


def letters(text: str) -> tuple[str, ...]:
    """A set of lower-case letters: a..z, or several ranges and letters joined by +, as a..m+x."""
    found: set[int] = set()
    for part in text.split("+"):
        match = re.fullmatch(r"([a-z])(?:\.\.([a-z]))?", part)
        span = match and range(ord(match[1]), ord(match[2] or match[1]) + 1)
        if not span:
            raise ValueError("letters, as a..z or a..m+x, from a to z")
        found |= {*span}
    return tuple(map(chr, sorted(found)))


class Draws:
    """Draws that depend on `key` alone, on every machine and in every Python release.

    Python guarantees that for `Random(key).random()`, but not for `shuffle`, `sample` or `randrange`.
    """

    def __init__(self, key: str):
        self.uniform = random.Random(key).random

    def below(self, count: int) -> int:
        """A number 0 .. `count` - 1."""
        return int(self.uniform() * count)

    def pick(self, values: Sequence[T]) -> T:
        """One of `values`."""
        return values[self.below(len(values))]

    def sample(self, values: Sequence[T], count: int) -> list[T]:
        """`count` items of `values` at different places, in random order."""
        left = list(values)
        for i in range(count):
            j = i + self.below(len(left) - i)
            left[i], left[j] = left[j], left[i]
        return left[:count]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        """`values` in random order."""
        return self.sample(values, len(values))


def conversation(program: str, answered: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Messages of a record: `program` and the first question by the user, its answer, the next question, ..

    answered: (question, answer) pairs.
    """
    messages = []
    for before, (question, answer) in zip([program, *[""] * (len(answered) - 1)], answered, strict=True):
        messages += [{"role": "user", "content": before + question}, {"role": "assistant", "content": answer}]
    return messages
