"""Settings without effect are refused: `optimiser.muon_momentum=0.9` if the optimiser is AdamW.

Every setting on the command line must have an effect. So must every setting of a recipe file that is not the default.
Exception: a file's setting returns to its default if the command line has turned off the feature that it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel

from .errors import UserError, shorten


class Unused(NamedTuple):
    """A dotted key without effect. switches: the keys that turned it off.   why: the reason, for the error message."""

    key: str
    switches: tuple[str, ...]
    why: str


def unused(recipe: BaseModel, prefix: str = "") -> Iterator[Unused]:
    """The keys of `recipe` and its sections that have no effect, as dotted keys from the root."""
    for key, switches, why in recipe.unused():  # pyright: ignore[reportAttributeAccessIssue]
        yield Unused(prefix + key, tuple(prefix + switch for switch in switches), why)
    for name in type(recipe).model_fields:
        if isinstance(value := getattr(recipe, name), BaseModel):
            yield from unused(value, f"{prefix}{name}.")


def turned_off(recipe: BaseModel, given: frozenset[str]) -> list[str]:
    """The file's settings that have no effect because the command line, which set `given`, turned them off.

    Raises UserError for any other setting without effect.
    """
    found = [(one, any(covers(given, switch) for switch in one.switches)) for one in unused(recipe)]
    found = [(one, off and not covers(given, one.key)) for one, off in found]
    refuse(recipe, (one for one, off in found if not off), given)
    return [one.key for one, off in found if off and _setting(recipe, one.key)[1]]


def refuse(recipe: BaseModel, keys: Iterable[Unused], given: frozenset[str] = frozenset()) -> None:
    """Raises UserError for the first of `keys` that `recipe` sets.

    given: the keys of the command line, which count with any value; other keys count if they differ from the default.
    """
    for key, _, why in keys:
        value, is_set, default = _setting(recipe, key)
        if is_set and value is not None and (covers(given, key) or value != default):
            shown = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            raise UserError(f"{key}={shorten(shown, 60)} has no effect: {why}")


def check_used(recipe: BaseModel) -> None:
    """Raises UserError for a setting without effect. For recipes that are made in Python."""
    refuse(recipe, unused(recipe))


def covers(given: Iterable[str], key: str) -> bool:
    """True if `given` has the dotted `key`, its section, or a key inside of it."""
    return any(key == one or one.startswith(key + ".") or key.startswith(one + ".") for one in given)


def _setting(recipe: BaseModel, key: str) -> tuple[Any, bool, Any]:
    """(value of a dotted key, True if it was set, its default)."""
    *section, name = key.split(".")
    holder: Any = recipe
    for part in section:
        holder = getattr(holder, part)
    default = type(holder).model_fields[name].get_default(call_default_factory=True)
    return getattr(holder, name), name in holder.model_fields_set, default
