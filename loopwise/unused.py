"""Settings without effect, which are refused: `optimiser.muon_momentum=0.9` where the optimiser is AdamW.

A setting on the command line has to have an effect, whatever its value. So has one in a recipe file that is not the
default; but where the command line has turned off what it belongs to, it goes back to its default instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel

from .errors import UserError, shorten


class Unused(NamedTuple):
    """A dotted key without effect. switches: the keys that make it so.   why: said to the user."""

    key: str
    switches: tuple[str, ...]
    why: str


def unused(recipe: BaseModel, prefix: str = "") -> Iterator[Unused]:
    """The keys of `recipe` and its sections that have no effect, by their names from the root."""
    for key, switches, why in recipe.unused():  # pyright: ignore[reportAttributeAccessIssue]
        yield Unused(prefix + key, tuple(prefix + switch for switch in switches), why)
    for name in type(recipe).model_fields:
        if isinstance(value := getattr(recipe, name), BaseModel):
            yield from unused(value, f"{prefix}{name}.")


def waiting(recipe: BaseModel, given: frozenset[str]) -> list[str]:
    """The keys without effect that a file has set, for what the command line, which set `given`, has turned off.

    Raises UserError for every other setting without effect.
    """
    found = [(one, any(covers(given, switch) for switch in one.switches)) for one in unused(recipe)]
    found = [(one, off and not covers(given, one.key)) for one, off in found]
    refuse(recipe, (one for one, waits in found if not waits), given)
    return [one.key for one, waits in found if waits and _setting(recipe, one.key)[1]]


def refuse(recipe: BaseModel, keys: Iterable[Unused], given: frozenset[str] = frozenset()) -> None:
    """Raises UserError for the first of `keys` that `recipe` sets: among `given`, those of the command line, or to
    another value than the default."""
    for key, _, why in keys:
        value, is_set, default = _setting(recipe, key)
        if is_set and value is not None and (covers(given, key) or value != default):
            shown = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            raise UserError(f"{key}={shorten(shown, 60)} has no effect: {why}")


def check_used(recipe: BaseModel) -> None:
    """Raises UserError for a setting without effect: for recipes that are made in Python."""
    refuse(recipe, unused(recipe))


def covers(given: Iterable[str], key: str) -> bool:
    """True where `given` has the dotted `key`, its section, or a part of it."""
    return any(key == one or one.startswith(key + ".") or key.startswith(one + ".") for one in given)


def _setting(recipe: BaseModel, key: str) -> tuple[Any, bool, Any]:
    """The value of a dotted key, whether it was set, and its default."""
    *section, name = key.split(".")
    holder: Any = recipe
    for part in section:
        holder = getattr(holder, part)
    default = type(holder).model_fields[name].get_default(call_default_factory=True)
    return getattr(holder, name), name in holder.model_fields_set, default
