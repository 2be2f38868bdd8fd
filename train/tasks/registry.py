"""The kinds of generated problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import hops
from .parameters import Draws, Parameter


@dataclass(frozen=True)
class Task:
    """A kind of problem.

    parameters: by name.   settle: fills in values that depend on other parameters; raises ValueError.   draw: (problem,
    record) from the settled values, `Draws` and the record's number.   vocabulary: tokens of one character each.
    silent: characters without a token.
    """

    parameters: dict[str, Parameter]
    settle: Callable[[dict[str, Any]], dict[str, Any]]
    draw: Callable[[dict[str, Any], Draws, int], tuple[str, dict[str, Any]]]
    vocabulary: tuple[str, ...]
    silent: str


TASKS = {"hops": Task(hops.PARAMETERS, hops.settle, hops.draw, hops.VOCABULARY, hops.SILENT)}
