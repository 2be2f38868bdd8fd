"""Random draws of a training step, as pure functions of (seed, step). No torch here.

Draws are therefore equal on every rank, under gradient accumulation and after a resume.
"""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

SIGMA = 0.5  # sigma of the log-normal rate in `poisson_lognormal`


def uniforms(seed: int, step: int, purpose: str = "recurrence") -> tuple[float, float]:
    """Two numbers in (0, 1) that depend on (seed, step, purpose) alone, through a hash.

    No generator state and no library version takes part.
    """
    digest = hashlib.blake2b(f"{purpose}/{seed}/{step}".encode(), digest_size=16).digest()
    first, second = (int.from_bytes(half, "little") >> 11 for half in (digest[:8], digest[8:]))
    return (first + 0.5) / 2**53, (second + 0.5) / 2**53


def poisson_lognormal(mean: int, cap: int, first: float, second: float) -> int:
    """Poisson(LogNormal(ln(mean) - sigma^2/2, sigma)) + 1, at most `cap`, by inversion of two uniforms.

    The rate has mean `mean`, so the sample has mean `mean` + 1, as in the authors' code.
    Source: Huginn (arXiv 2502.05171) and retrofitted recurrence (arXiv 2511.07384).
    """
    rate = mean * math.exp(SIGMA * NormalDist().inv_cdf(first) - SIGMA**2 / 2)
    below = 0.0
    for count in range(cap - 1):
        below += _poisson(count, rate)
        if second < below:
            return count + 1
    return cap


def truncated_poisson(rate: int, low: int, high: int, uniform: float) -> int:
    """Poisson(rate) conditioned on low .. high, by inversion."""
    weights = [_poisson(count, rate) for count in range(low, high + 1)]
    total, below = math.fsum(weights), 0.0
    if total == 0:  # underflow far outside of low .. high: the nearest bound has almost all of the mass
        return low if rate < low else high
    for count, weight in enumerate(weights, low):
        below += weight / total
        if uniform < below:
            return count
    return high


def _poisson(count: int, rate: float) -> float:
    return math.exp(count * math.log(rate) - rate - math.lgamma(count + 1))


def nested_depths(seed: int, step: int, recurrences: int, count: int) -> list[int]:
    """`count` distinct depths out of 1 .. `recurrences`, in order: the sub-models of SortedNet (arXiv 2309.00255)."""
    keys = sorted((uniforms(seed, step, f"nested/{depth}")[0], depth) for depth in range(1, recurrences + 1))
    return sorted(depth for _, depth in keys[: min(count, recurrences)])


def progressive_part(seed: int, step: int, recurrences: int) -> tuple[int, int]:
    """(n, k): uniform 0 <= n < `recurrences`, and then uniform 1 <= k <= `recurrences` - n.

    The draws of `get_output_for_prog_loss` in Deep Thinking's code (arXiv 2202.05826).
    """
    first, second = uniforms(seed, step, "progressive")
    before = int(first * recurrences)
    return before, 1 + int(second * (recurrences - before))
