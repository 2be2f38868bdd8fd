"""Settings that a token is drawn by, and the tokens that end a text, as generation_config.json has them.

One table for all of Loopwise: conversion carries what it allows, and the engines sample by what was carried. Imports
nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .errors import UserError

# Name -> whether a number will do, and the rule. The rules are vLLM's; transformers' are the same but for RESPELT.
SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda x: 0 <= x < math.inf, "a number of 0 or more"),
    "top_k": (lambda x: isinstance(x, int) and x >= -1, "an integer of 0 or more; -1: all"),
    "top_p": (lambda x: 0 < x <= 1, "a number above 0, up to 1"),
    "min_p": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "a number above 0"),
    "presence_penalty": (lambda x: -2 <= x <= 2, "a number from -2 to 2"),
    "frequency_penalty": (lambda x: -2 <= x <= 2, "a number from -2 to 2"),
}
# (name, value) -> the fields that say the same to transformers, which has no such value.
RESPELT: dict[tuple[str, Any], dict[str, Any]] = {
    ("temperature", 0): {"do_sample": False},
    ("top_k", -1): {"top_k": 0},
}


def check_setting(name: str, value: Any) -> None:
    """Raises UserError for a `value` that setting `name` of the table cannot have."""
    holds, rule = SETTINGS[name]
    if type(value) not in (int, float) or not holds(value):
        raise UserError(f"{name}={value!r}: {rule}")


def respelt(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` as transformers can sample by them, with the same meaning: see RESPELT, and a float for a whole number,
    where it takes nothing else. All values of the table's settings are allowed ones."""
    made = dict(fields)
    for (name, value), others in RESPELT.items():
        if type(made.get(name)) in (int, float) and made[name] == value:
            del made[name]
            made |= others
    for name in SETTINGS:
        if type(made.get(name)) is int and name != "top_k":
            made[name] = float(made[name])
    return made


def end_tokens(ids: Any) -> list[int]:
    """The tokens of `ids`, an eos_token_id: None, one or a list. Raises UserError for what is no integer."""
    each = list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    if wrong := [token for token in each if type(token) is not int]:
        raise UserError(f"eos_token_id={wrong[0]!r}: a token id, or a list of them")
    return each


def greatest_id(tokenizer: Any) -> int:
    """The greatest id that `tokenizer` gives; -1 where it gives none."""
    return max(tokenizer.get_vocab().values(), default=-1)
