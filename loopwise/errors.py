"""The one error type for bad input, and how its messages are worded: the nearest valid name, another error's reason."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message names the value, the rule and the choices; the command line prints it and exits 2."""


def unknown(kind: str, value: str, choices: Iterable[str]) -> UserError:
    """An error for `value`, which is none of `choices`: names the nearest one, then all of them."""
    choices = sorted(choices)
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {value!r}: {hint}choose from {', '.join(choices)}")


def reason(error: Exception) -> str:
    """What another library's error says, in one line of bearable length."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
