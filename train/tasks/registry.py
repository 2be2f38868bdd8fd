"""The kinds of generated problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import hops, parity, s5, sums
from .parameters import Draws, Parameter
from .words import Words


@dataclass(frozen=True)
class Task:
    """A kind of problem.

    parameters: by name.   settle: fills in values that depend on other parameters; raises ValueError.   draw: (problem,
    record) from the settled values, `Draws` and the record's number.   vocabulary: tokens of one character each.
    silent: characters without a token.   guess: from the settled values and a record, the probability that a guess
    answers each of its questions; None where no simple one is known.
    """

    parameters: dict[str, Parameter]
    settle: Callable[[dict[str, Any]], dict[str, Any]]
    draw: Callable[[dict[str, Any], Draws, int], tuple[str, dict[str, Any]]]
    vocabulary: tuple[str, ...]
    silent: str
    guess: Callable[[dict[str, Any], dict[str, Any]], list[float]] | None = None


def _of_words(words: Words) -> Task:
    guess = words.guess if words.forms else None
    return Task(words.parameters, words.settle, words.draw, VOCABULARY, hops.SILENT, guess)


# One vocabulary for all but `hops`, so that a model can learn them together, and hops with them.
VOCABULARY = (*hops.VOCABULARY, "+", "-", ",")
TASKS = {
    "hops": Task(hops.PARAMETERS, hops.settle, hops.draw, hops.VOCABULARY, hops.SILENT, hops.guess),
    "sums": _of_words(sums.WORDS),
    "parity": _of_words(parity.WORDS),
    "s5": _of_words(s5.WORDS),
}
