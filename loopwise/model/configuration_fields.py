"""Kinds of the fields of a recurrent-depth config, checked on loading and on saving."""

from __future__ import annotations

import math
from typing import Any

# By the annotation of a field: accepted types, and how the error describes them.
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a string"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a finite number"),
    "bool": ((bool,), "True or False"),
    "list[int]": ((list, tuple), "a list of integers"),
    "dict[str, Any] | None": ((dict, type(None)), "a dict, or None"),
    "int | None": ((int, type(None)), "an integer, or None"),
    "int | list[int] | None": ((int, list, tuple, type(None)), "an integer, a list of them, or None"),
}


def check_kinds(config: Any) -> None:
    """Raise ValueError, naming the value and the rule, for the first field of `config` that is not of its kind."""
    for name, annotation in type(config).__annotations__.items():
        if annotation in KINDS:
            kinds, wanted = KINDS[annotation]
            value = getattr(config, name)
            if not _fits(value, kinds):
                raise ValueError(f"{name}={value!r}: {wanted}")
    if config.state_std < 0:
        raise ValueError(f"state_std={config.state_std}: a number of 0 or more")
    if not _fits(config.vocab_size, (int,)) or config.vocab_size < 1:
        raise ValueError(f"vocab_size={config.vocab_size!r}: an integer, at least 1")
    if config.relaxation is not None:
        _check_relaxation(config.relaxation)


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        return False
    if isinstance(value, list | tuple):
        return all(_fits(part, (int,)) for part in value)
    return not isinstance(value, float) or math.isfinite(value)


def _check_relaxation(given: dict[str, Any]) -> None:
    """The fields that `Relaxation` takes, see `relaxation.py`."""
    rank, own = given.get("rank"), given.get("own")
    rules = {
        "depths": (_fits(given.get("depths"), (int,)) and given["depths"] >= 1, "an integer, at least 1"),
        "rank": (
            isinstance(rank, dict)
            and all(_fits(name, (str,)) and _fits(r, (int,)) and r > 0 for name, r in rank.items()),
            "a dict from names of linear modules to integers above 0",
        ),
        "own": (isinstance(own, list) and all(isinstance(name, str) for name in own), "a list of names of parameters"),
        "dora": (isinstance(given.get("dora", False), bool), "True or False"),
    }
    for name in sorted(given.keys() - rules.keys()):
        raise ValueError(f"relaxation.{name} is no field of a relaxation: it has {', '.join(rules)}")
    for name, (right, wanted) in rules.items():
        if not right:
            raise ValueError(f"relaxation.{name}={given.get(name)!r}: {wanted}")
