"""How many lanes a pass of the core has nearly for free: the knee of its time over its lanes, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .attention import Rows

if TYPE_CHECKING:
    from .loop import Loop

SLOWER = 1.5  # a pass up to the knee takes at most so many times what one of a single lane takes
REPEATS, MOST, POSITIONS = 5, 1024, 16


@torch.inference_mode()
def knee(loop: Loop, agree: Callable[[float], float] = lambda seconds: seconds) -> tuple[int, dict[int, float]]:
    """(lanes, seconds of the passes that were tried, by lanes) of a loop without requests, whose block tables may be
    written through. `agree` makes several ranks that measure together go by the same times."""
    rows = len(loop.requests.limit)
    most = min(rows * min(loop.wave, POSITIONS), MOST)
    sizes = sorted({n for k in range(11) for n in (2**k, 3 * 2**k // 2) if n <= most} | {most})
    times: dict[int, float] = {}
    best = 1
    for n in sizes:
        times[n] = agree(_seconds(loop, n, rows))
        if times[n] > SLOWER * times[1]:
            break
        best = n
    return best, times


def _seconds(loop: Loop, n: int, rows: int) -> float:
    """The median time of a pass that reads out each of its n lanes."""
    row = torch.arange(n, device=loop.device) * min(rows, n) // n
    position = torch.arange(n, device=loop.device) - torch.searchsorted(row, row)
    zeros = torch.zeros_like(row)
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        e = loop.prelude(zeros, row, position)
        loop.attention.plan(Rows(loop.requests.table, row, position, zeros))
        s = loop.recur(loop.parts, e, e.clone(), position, zeros)
        loop.parts.logits(loop._coda(s, row, position)).argmax(-1).tolist()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
