"""Sums of signed numbers: `a=+3-5+7;?a=+5`. The value of a word has the form of its elements, a sign and digits."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from .parameters import Draws, Parameter, integer, numbers
from .words import Words


def _element(values: dict[str, Any], draws: Draws) -> str:
    digits = draws.pick(values["digits"])
    least = 10 ** (digits - 1) if digits > 1 else 0
    return draws.pick("+-") + str(least + draws.below(10**digits - least))


def _products(values: dict[str, Any], word: list[str]) -> list[str]:
    modulo = values["modulo"]
    return [f"{total % modulo if modulo else total:+d}" for total in accumulate(map(int, word))]


WORDS = Words(
    _element,
    _products,
    {
        "digits": Parameter(numbers(1, 6), (1,), "digits of a number, equally likely"),
        "modulo": Parameter(integer(2, 1_000_000), None, "the sum is taken modulo this number (default: it is not)"),
    },
)
