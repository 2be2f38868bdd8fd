"""Format version and types of the fields of a recurrent-depth config, checked on loading and on saving."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, cast

FORMAT_VERSION = 1  # written into config.json; a config without a version has the first

# Annotation of a field -> accepted types, and their description in errors.
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a string"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a finite number"),
    "bool": ((bool,), "True or False"),
    "list[int]": ((list, tuple), "a list of integers"),
    "float | str": ((int, float, str), "a finite number or a string"),
    "float | None": ((int, float, type(None)), "a finite number, or None"),
    "dict[str, Any] | None": ((dict, type(None)), "a dict, or None"),
    "int | None": ((int, type(None)), "an integer, or None"),
    "int | list[int] | None": ((int, list, tuple, type(None)), "an integer, a list of them, or None"),
}
EXIT_FIELDS = {"rule": "str", "threshold": "float | None", "min_recurrences": "int"}  # keys of the field `exit`


def check_fields(values: Mapping[str, Any], annotations: Mapping[str, str]) -> None:
    """Raise ValueError, naming the value and the rule, for the first of `values` that is not of its annotated kind."""
    for name, annotation in annotations.items():
        if annotation in KINDS and name in values:
            kinds, wanted = KINDS[annotation]
            if not _fits(values[name], kinds):
                raise ValueError(f"{name}={values[name]!r}: {wanted}")


def check_version(version: object) -> None:
    """Raise ValueError for a `format_version` of config.json that this code does not know."""
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version={version!r}: an integer of 1 or more")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version={version}: a newer loopwise wrote this config, and this one reads versions up to "
            f"{FORMAT_VERSION}; upgrade loopwise"
        )


def check_kinds(config: Any) -> None:
    """Raise ValueError, naming the value and the rule, for the first field of `config` that has another type."""
    annotations = type(config).__annotations__
    check_fields({name: getattr(config, name) for name in annotations}, annotations)
    if config.state_std < 0:
        raise ValueError(f"state_std={config.state_std}: a number of 0 or more")
    if not _fits(config.vocab_size, (int,)) or config.vocab_size < 1:
        raise ValueError(f"vocab_size={config.vocab_size!r}: an integer, at least 1")
    if not 0 < config.halting_epsilon < 1:
        raise ValueError(f"halting_epsilon={config.halting_epsilon}: a number between 0 and 1")
    if config.relaxation is not None:
        _check_object("relaxation", config.relaxation, RELAXATION)
    if config.time_conditioning is not None:
        _check_object("time_conditioning", config.time_conditioning, TIME_CONDITIONING)
    if config.trained_recurrences is not None:
        _check_trained(config.trained_recurrences)


def is_number(value: object) -> TypeGuard[int | float]:
    """True for a finite number. True and False are no numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fits(value: object, kinds: tuple[type, ...]) -> bool:
    """True for a value of one of these types. Numbers are finite, lists hold integers alone."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        return False
    if isinstance(value, list | tuple):
        parts: list[object] = [*value]
        return all(_fits(part, (int,)) for part in parts)
    return not isinstance(value, float) or math.isfinite(value)


def _is_rank(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    ranks = cast("dict[object, Any]", value)
    return all(_fits(name, (str,)) and _fits(rank, (int,)) and rank > 0 for name, rank in ranks.items())


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in cast("list[object]", value))


# Field of `relaxation` -> check, rule, and the value of a field that is left out. See `relaxation.py`.
RELAXATION: dict[str, tuple[Callable[[Any], bool], str, Any]] = {
    "depths": (lambda value: _fits(value, (int,)) and value >= 1, "an integer, at least 1", None),
    "rank": (_is_rank, "a dict from names of linear modules to integers above 0", None),
    "own": (_is_names, "a list of names of parameters", None),
    "dora": (lambda value: isinstance(value, bool), "True or False", False),
}


# Fields of `time_conditioning`, as above.
TIME_CONDITIONING: dict[str, tuple[Callable[[Any], bool], str, Any]] = {
    "scale": (_is_names, "a list of names of modules", []),
    "gate": (_is_names, "a list of names of modules", []),
    "frequencies": (lambda value: _fits(value, (int,)) and value > 1 and value % 2 == 0, "an even integer", 256),
}


def _check_object(field: str, given: Mapping[str, Any], table: Mapping[str, tuple[Callable[[Any], bool], str, Any]]):
    """Raise ValueError unless `given`, the value of `field`, has the fields of `table` alone, each as it says."""
    for name in sorted(given.keys() - table.keys()):
        raise ValueError(f"{field}.{name} is no field of a {field.replace('_', ' ')}: it has {', '.join(table)}")
    for name, (fits, wanted, default) in table.items():
        if not fits(given.get(name, default)):
            raise ValueError(f"{field}.{name}={given.get(name)!r}: {wanted}")


def _check_trained(given: Mapping[str, Any]) -> None:
    """Raise ValueError unless these are the numbers of recurrences of a training: `mean`, `min` and `max`."""
    kinds: dict[str, tuple[type, ...]] = {"mean": (int, float), "min": (int,), "max": (int,)}
    if (
        given.keys() != kinds.keys()
        or any(type(given[name]) not in kind for name, kind in kinds.items())
        or not 1 <= given["min"] <= given["mean"] <= given["max"]
    ):
        raise ValueError(
            f"trained_recurrences={given!r}: null, or an object of numbers with 1 <= min <= mean <= max, min and max "
            "whole"
        )
