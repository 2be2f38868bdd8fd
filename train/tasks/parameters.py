"""Parameters of a generated task, and reproducible draws for its records."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a task's source.

    read: parses the text after `=`; raises ValueError with the rule.   default: the value without that text; a task may
    compute a None from the other parameters.   meaning: for help and docs.
    """

    read: Callable[[str], Any]
    default: Any
    meaning: str


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
