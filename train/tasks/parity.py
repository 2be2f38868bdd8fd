"""Parity of bits: `a=0110;b=10;?b=1`. With answer=running, the parity after each bit."""

from __future__ import annotations

from itertools import accumulate
from operator import xor
from typing import Any

from .parameters import Draws
from .words import Words


def _element(values: dict[str, Any], draws: Draws) -> str:
    return draws.pick("01")


def _products(values: dict[str, Any], word: list[str]) -> list[str]:
    return [str(bit) for bit in accumulate(map(int, word), xor)]


WORDS = Words(_element, _products, {}, forms=2)
