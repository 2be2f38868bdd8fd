"""Old names that are still accepted: recipe keys, request fields, and keywords of the engine.

A table maps each old name to today's name. `rename` applies a table to a dict; an old name costs one warning line.
The model's files travel without this module: an old field of config.json goes into the class's `attribute_map`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Mapping
from typing import NamedTuple, TypeVar

from .errors import UserError

V = TypeVar("V")


class Renamed(NamedTuple):
    """Today's name. since: the release that renamed it; None for a second spelling, which is accepted silently."""

    new: str
    since: str | None = None


# Old recipe keys, for every section that has the new key: in files, in `key=value` and in Python.
RECIPE_KEYS: dict[str, Renamed] = {"optimizer": Renamed("optimiser")}

_warned: set[tuple[str, str]] = set()  # (kind, old name) of this process


def print_warning(line: str) -> None:
    print(f"loopwise: {line}", file=sys.stderr, flush=True)


def current_name(
    name: str,
    table: Mapping[str, Renamed],
    known: Container[str],
    kind: str,
    warn: Callable[[str], object] = print_warning,
) -> str:
    """Today's name of `name`, as `rename` finds it."""
    entry = table.get(name)
    if entry is None or name in known or entry.new not in known:
        return name
    if entry.since is not None and (kind, name) not in _warned:
        _warned.add((kind, name))
        warn(f"warning: {kind} {name!r} is deprecated since loopwise {entry.since}: use {entry.new!r}")
    return entry.new


def rename(
    values: Mapping[str, V],
    table: Mapping[str, Renamed],
    known: Container[str],
    kind: str,
    warn: Callable[[str], object] = print_warning,
) -> dict[str, V]:
    """A copy of `values` in which every old name of `table` is today's name. The order is kept.

    known: the names that are valid where `values` stand; an old name applies where its new name is one of them.
    kind: the noun of messages, for example "recipe key".
    warn: gets one line for each deprecated name, once in a process.
    Raises UserError where both names of one value are given.
    """
    renamed: dict[str, V] = {}
    for name, value in values.items():
        new = current_name(name, table, known, kind, warn)
        if new != name and new in values:
            raise UserError(f"{kind}s {name!r} and {new!r} are two names of one value: give {new!r} alone")
        renamed[new] = value
    return renamed
