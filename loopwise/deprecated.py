"""Old names that are still accepted: recipe keys, request fields, keywords and attributes of classes.

A table maps each old name to today's name. `rename` applies a table to a dict; an old name costs one warning line.
The model's files travel without this module: an old field of config.json goes into the class's `attribute_map`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any, NamedTuple, TypeVar

from .errors import UserError

T = TypeVar("T")
V = TypeVar("V")


class Renamed(NamedTuple):
    """Today's name. since: the release that renamed it; None for a second spelling, which is accepted silently."""

    new: str
    since: str | None = None


# Old names of serving, for every place that has the new name: keywords of Engine, Params, DiffusionSettings and
# LaneConfig, recipe keys, request fields.
SERVING: dict[str, Renamed] = {
    "rows": Renamed("max_num_seqs", "0.2.0"),
    "length": Renamed("max_model_len", "0.2.0"),
    "prompt_lanes": Renamed("max_num_batched_tokens", "0.2.0"),
    "ticks": Renamed("passes_per_step", "0.2.0"),
    "width": Renamed("max_lanes", "0.2.0"),
    "wave": Renamed("max_in_flight", "0.2.0"),
}
# Old recipe keys, for every section that has the new key: in files, in `key=value` and in Python.
RECIPE_KEYS: dict[str, Renamed] = {"optimizer": Renamed("optimiser"), **SERVING}

_warned: set[tuple[str, str]] = set()  # (kind, old name) of this process


def print_warning(line: str) -> None:
    print(f"loopwise: {line}", file=sys.stderr, flush=True)


def two_names(old: str, new: str, kind: str) -> str:
    """The error message for both names of one value."""
    return f"{kind}s {old!r} and {new!r} are two names of one value: give {new!r} alone"


def current_name(
    name: str,
    table: Mapping[str, Renamed],
    known: Container[str],
    kind: str,
    warn: Callable[[str], object] | None = print_warning,
) -> str:
    """Today's name of `name`, as `rename` finds it. warn: None for no warning."""
    entry = table.get(name)
    if entry is None or name in known or entry.new not in known:
        return name
    if warn is not None and entry.since is not None and (kind, name) not in _warned:
        _warned.add((kind, name))
        warn(f"warning: {kind} {name!r} is deprecated since loopwise {entry.since}: use {entry.new!r}")
    return entry.new


def rename(
    values: Mapping[str, V],
    table: Mapping[str, Renamed],
    known: Container[str],
    kind: str,
    warn: Callable[[str], object] | None = print_warning,
) -> dict[str, V]:
    """A copy of `values` in which every old name of `table` is today's name. The order is kept.

    known: the names that are valid where `values` stand; an old name applies where its new name is one of them.
    kind: the noun of messages, for example "recipe key".
    warn: gets one line for each deprecated name, once in a process; None for no warning.
    Raises UserError where both names of one value are given, before any warning.
    """
    for name in values:
        new = current_name(name, table, known, kind, None)
        if new != name and new in values:
            raise UserError(two_names(name, new, kind))
    return {current_name(name, table, known, kind, warn): value for name, value in values.items()}


class OldAttribute:
    """An attribute by its old name: reads and writes the attribute `new`, with one warning line."""

    def __init__(self, old: str, table: Mapping[str, Renamed]):
        self.old, self.table, self.new = old, table, table[old].new

    def __get__(self, holder: Any, kind: type | None = None) -> Any:
        if holder is None:
            return self
        current_name(self.old, self.table, (self.new,), "attribute")
        return getattr(holder, self.new)

    def __set__(self, holder: Any, value: Any) -> None:
        current_name(self.old, self.table, (self.new,), "attribute")
        setattr(holder, self.new, value)


def accept_old_names(table: Mapping[str, Renamed]) -> Callable[[type[T]], type[T]]:
    """A class decorator: keywords and attributes of the class may have the old names of `table`.

    So may the changes of `dataclasses.replace`. Both names of one value in a call raise UserError.
    """

    def decorate(cls: type[T]) -> type[T]:
        made: Any = cls
        init, known = made.__init__, list(inspect.signature(made.__init__).parameters)[1:]

        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **values: Any) -> None:
            if is_dataclass(cls):
                values = _without_replaced(values, table, known)
            init(self, *args, **rename(values, table, known, "keyword"))

        made.__init__ = __init__
        for old, entry in table.items():
            if entry.new in known and old not in known:
                setattr(cls, old, OldAttribute(old, table))
        return cls

    return decorate


def _without_replaced(values: dict[str, Any], table: Mapping[str, Renamed], fields: list[str]) -> dict[str, Any]:
    """Keywords `values` of a dataclass without the fields that `dataclasses.replace` has filled in beside an old name.

    `replace` passes every field: those that it changes, then all others in their order.
    """
    if not values.keys() >= {*fields}:
        return values
    keys = list(values)

    def is_filled(field: str) -> bool:
        behind = keys[keys.index(field) :]
        return behind == [name for name in fields if name in behind]

    replaced = {new for name in keys if (new := current_name(name, table, fields, "keyword", None)) != name}
    return {name: value for name, value in values.items() if name not in replaced or not is_filled(name)}


def old_names(table: Mapping[str, Renamed], known: Iterable[str]) -> dict[str, str]:
    """Today's name by old name, for the names in `known`."""
    names = {*known}
    return {old: entry.new for old, entry in table.items() if entry.new in names and old not in names}
