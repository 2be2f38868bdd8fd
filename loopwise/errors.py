"""The one error type for bad input, and how its messages are worded: the nearest valid name, another error's reason."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message names the value, the rule and the choices; the command line prints it and exits 2."""


FEW = 12  # choices that one line names all of


def unknown(kind: str, value: str, choices: Iterable[str], few: int = FEW) -> UserError:
    """An error for `value`, which is none of `choices`: names the nearest one, then all if they are at most `few`."""
    choices = sorted(choices)
    near = nearest(value, choices)
    hint = f"did you mean {near[0]!r}? " if near else ""
    if len(choices) <= few:
        return UserError(f"unknown {kind} {value!r}: {hint}choose from {', '.join(choices)}")
    others = f"near it are {', '.join(near[1:])}; " if near[1:] else ""
    return UserError(f"unknown {kind} {value!r}: {hint}{others}--help lists all {len(choices)}")


def nearest(value: str, choices: list[str], count: int = 4) -> list[str]:
    """The `choices` that `value` may stand for, best first: its abbreviation, then what is spelt alike.

    The last part of a dotted key counts most: `optimiser.lr` is `optimiser.learning_rate`, and so is `learning_rate`.
    """
    section, _, name = value.rpartition(".")

    def likeness(choice: str) -> float:
        its_section, _, its_name = choice.rpartition(".")
        alike = difflib.SequenceMatcher(None, name, its_name).ratio()
        if name and name == "".join(word[:1] for word in its_name.split("_")):
            alike = 0.95
        return alike - (0.0 if section == its_section else 0.05 if not section else 0.2)

    found = sorted(((likeness(choice), choice) for choice in choices), key=lambda pair: (-pair[0], pair[1]))
    return [choice for score, choice in found[:count] if score >= 0.5]


def missing(what: str, needed: str, extra: str, otherwise: str = "") -> UserError:
    """An error for `what`, whose packages (`needed`) the extra `extra` brings, or the way that `otherwise` names.

    The advice is for a clone: it holds before the package is published, and after.
    """
    return UserError(f"{what} needs {needed}: in a clone of Loopwise, run pip install -e '.[{extra}]'{otherwise}")


def reason(error: Exception) -> str:
    """The message of another library's error, in one line of bearable length."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def shorten(text: str, width: int) -> str:
    """`text`, or its beginning where it is longer than `width`."""
    return text if len(text) <= width else text[: width - 4] + " ..."
