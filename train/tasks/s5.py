"""The word problem of S5: `a=21345,34512;?a=34521`, the composition of permutations of five points.

A permutation p is written as its images p(1) to p(5). A word p,q,.. is the composition p(q(..)): the image of i under
`p,q` is number q(i) of p's images. So a further permutation picks from the images so far, and a step is five lookups.
S5 is not solvable: its word problem is complete for NC1, and no fixed depth is expected to solve it at all lengths
(Merrill, Petty, Sabharwal, arXiv 2404.08819).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from .parameters import Draws
from .words import Words

POINTS = "12345"


def _element(values: dict[str, Any], draws: Draws) -> str:
    return "".join(draws.shuffled(POINTS))


def _products(values: dict[str, Any], word: list[str]) -> list[str]:
    return list(accumulate(word, lambda before, p: "".join(before[int(i) - 1] for i in p)))


WORDS = Words(_element, _products, {}, separator=",", forms=120)
