"""The tree search for each question, and for all of them together.

A search for one question knows its answer. So the share of questions that some chain answers is a bound on what a
perfect choice of chains would reach, not the accuracy of any model. The chain that is searched for all questions is a
model; its accuracy counts on other questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

from .bench import Bench
from .program import Program
from .recipe import Search
from .record import Record
from .tree import Chain, Settings, search

Report = Callable[[], object]
ALL = 1 - 1e-6  # value of a sample whose answers are all right


def settings_of(recipe: Search) -> Settings:
    """The settings of the tree search in `recipe`."""
    return Settings(recipe.simulations, recipe.longest, recipe.exploration, recipe.length_penalty, recipe.random_share)


def each(bench: Bench, recipe: Search, layers: int, record: Record, report: Report) -> dict[str, Any]:
    """A search for every question of `bench` that the record lacks; the summary of all of them."""
    done = {row["question"] for row in record.result["questions"]}
    for number in range(len(bench.weights)):
        if number not in done:
            record.add("questions", one(bench, recipe, layers, number))
        report()
    record.write()
    return summary(record.result["questions"], layers)


def one(bench: Bench, recipe: Search, layers: int, number: int) -> dict[str, Any]:
    """The search for question `number`.

    A sample with several answers counts as right where all of them are.
    Returns {"question", "right" (of the source), "shortest" (the shortest right chain; None without any), "longest"
    (layers of the longest right chain), "tried", "first" (number of tries up to the first right chain that is new)}.
    """

    def reward(chain: Chain) -> float:
        return float(bench.values(Program.chain(chain), [number])[0] / bench.weights[number])

    found = search(layers, reward, settings_of(recipe), Random(f"{recipe.seed}/{number}"), {})
    source = tuple(range(layers))
    right = [chain for chain, value in found.items() if value > ALL]
    new = next((i for i, (chain, value) in enumerate(found.items()) if value > ALL and chain != source), None)
    return {
        "question": number,
        "right": found[source] > ALL,
        "shortest": min(right, key=len, default=None),
        "longest": max(map(len, right), default=None),
        "tried": len(found),
        "first": new,
    }


def summary(questions: list[dict[str, Any]], layers: int) -> dict[str, Any]:
    """Shares with standard errors, over `questions`.

    "shorter": right questions with a right chain of fewer layers.   "mended": wrong questions with a right chain.
    "mean_layers": of the shortest right chains, where there is one; else the source's.
    """
    right = [row for row in questions if row["right"]]
    wrong = [row for row in questions if not row["right"]]
    shorter = [row["shortest"] is not None and len(row["shortest"]) < layers for row in right]
    mended = [row["shortest"] is not None for row in wrong]
    lengths = [len(row["shortest"]) if row["shortest"] else layers for row in questions]
    return {
        "questions": len(questions),
        "accuracy": _share([row["right"] for row in questions]),
        "shorter": _share(shorter),
        "mended": _share(mended),
        "reachable": _share([row["shortest"] is not None for row in questions]),
        "mean_layers": sum(lengths) / len(lengths),
        "tried": sum(row["tried"] for row in questions),
    }


def _share(flags: list[bool]) -> dict[str, float | int | None]:
    if not flags:
        return {"share": None, "error": None, "of": 0}
    p, n = sum(flags) / len(flags), len(flags)
    return {"share": p, "error": math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None, "of": n}


def together(bench: Bench, recipe: Search, layers: int, record: Record, report: Report) -> Program:
    """The chain of the highest value over all questions; of equal ones, the shortest.

    The record holds the tried chains with their values, which a search that goes on takes over.
    """
    known = {tuple(row["chain"]): row["value"] for row in record.result["tried"]}

    def reward(chain: Chain) -> float:
        values = bench.values(Program.chain(chain))
        value = float(values.sum() / bench.weights.sum())
        record.add("tried", {"chain": [*chain], "value": value})
        report()
        return value

    found = search(layers, reward, settings_of(recipe), Random(f"{recipe.seed}/all"), known)
    record.write()
    return Program.chain(max(found, key=lambda chain: (found[chain], -len(chain))))
