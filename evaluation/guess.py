"""The right answers that guessing gets, of generated tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..train import tasks
from ..train.data.documents import some_records
from .recipe import Evaluate


def guessing(recipe: Evaluate, count: int) -> dict[str, Any] | None:
    """Mean probability that a guess is right: {"accuracy", "groups": {name: {"accuracy"}}}.

    A guess knows the form of an answer, and takes all that fit with equal probability: for `task:hops`, the digits in
    the record. None where a source has no such number, and where other answers than the `count` measured ones would
    enter.
    """
    if not all(map(tasks.is_task, recipe.data)) or recipe.eval_fraction:
        return None
    shares: list[float] = []
    of_group: dict[str, list[float]] = {}
    for source, record in _records(recipe):
        found = source.guess(record)
        if found is None:
            return None
        shares += found
        group = record.get(recipe.group) if recipe.group else None
        groups = group if isinstance(group, list) else [group] * len(found)
        for share, name in zip(found, groups, strict=True):
            of_group.setdefault(str(name), []).append(share)
    if len(shares) != count:
        return None
    groups = {name: {"accuracy": sum(own) / len(own)} for name, own in of_group.items()} if recipe.group else {}
    return {"accuracy": sum(shares) / len(shares), "groups": groups}


def _records(recipe: Evaluate) -> Iterator[tuple[tasks.Source, dict[str, Any]]]:
    sources = [tasks.parse(source) for source in recipe.data]
    most = recipe.limit or sum(source.values["records"] for source in sources)
    for i, number in some_records(sources, most):
        yield sources[i], sources[i].record(number)
