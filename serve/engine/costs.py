"""What a pass of the core and a read-out cost, measured: how many lanes are nearly free, and how long exits may wait
for others that are read out with them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from statistics import linear_regression
from typing import TYPE_CHECKING, NamedTuple

import torch

from .attention import Rows
from .graphs import padded
from .readout import coda

if TYPE_CHECKING:
    from .loop import Loop

SLOWER = 1.5  # a pass up to the knee takes at most so many times what one of a single lane takes
REPEATS, SECONDS = 5, 0.5  # of each size: so many times, or as often as that takes
MOST, POSITIONS = 1024, 16


class Costs(NamedTuple):
    """Seconds by number of lanes: of passes of the core, and of read-outs (coda, head, and the prelude of what comes
    next)."""

    passes: dict[int, float]
    reads: dict[int, float]

    def knee(self) -> int:
        """The most lanes that a pass, with a read-out of them all, has nearly for free."""
        whole = {n: seconds + self.reads[n] for n, seconds in self.passes.items()}
        best = min(whole)
        for n in sorted(whole):
            if whole[n] > SLOWER * whole[min(whole)]:
                break
            best = n
        return best

    def patience(self, lanes: float, reads: float, depth: float) -> int:
        """How many ticks an exit should wait at most, where a pass has so many `lanes`, a tick so many `reads`, and a
        position a mean `depth`.

        Let a pass of n lanes take a + b n, a read-out of m take c + d m, and read-outs be k ticks apart. Of L resident
        requests L E / (E + (k - 1) / 2) run, so that L tokens take a k / 2 + c (E - 1/2) / k and what k does not
        change: least at k = sqrt((2 E - 1) c / a). A wait of E ticks is the most, which all exits of one depth meet in.
        """
        fixed, whole = _fixed(self.passes, lanes)
        read = _fixed(self.reads, reads)[0]
        every = math.sqrt(max(2 * depth - 1, 0) * read / max(fixed, whole / 100))
        return max(round(min(every, depth)) - 1, 0)


def _fixed(times: dict[int, float], n: float) -> tuple[float, float]:
    """(what does not grow with n of the time at n, all of it): by the line that fits the sizes from n / 4 to the one
    above n best, as single measurements scatter."""
    sizes = sorted(times)
    if len(sizes) == 1:
        return times[sizes[0]], times[sizes[0]]
    end = min(max(sum(size <= n for size in sizes) + 1, 2), len(sizes))
    start = min(sum(size < n / 4 for size in sizes), end - 2)
    some = sizes[start:end]
    slope, fixed = linear_regression(some, [times[size] for size in some])
    slope = max(slope, 0.0)
    fixed = max(fixed, 0.0) if slope else sum(times[size] for size in some) / len(some)
    return fixed, fixed + slope * n


@torch.inference_mode()
def measure(loop: Loop, agree: Callable[[float], float] = lambda seconds: seconds) -> Costs:
    """Of a loop without requests, whose block tables may be written through. `agree` makes several ranks that measure
    together go by the same times."""
    rows = loop.requests.rows
    most = min(rows * min(loop.wave, POSITIONS), MOST)
    sizes = sorted({n for k in range(11) for n in (2**k, 3 * 2**k // 2) if n <= most} | {most})
    costs = Costs({}, {})
    for n in sizes:
        if n > rows and costs.knee() < max(costs.passes):
            break  # more than a pass of plain requests can have, and behind the knee
        seconds = torch.tensor(list(_samples(loop, n, rows)))[1:]
        costs.passes[n], costs.reads[n] = (agree(min(part)) for part in seconds.T.tolist())
    return costs


def _samples(loop: Loop, n: int, rows: int) -> Iterator[tuple[float, float]]:
    """Seconds of a pass of n lanes and of a read-out of them, again and again; the first warms up."""
    row = torch.arange(n, device=loop.device) * min(rows, n) // n
    position = torch.arange(n, device=loop.device) - torch.searchsorted(row, row)
    zeros = torch.zeros_like(row)
    e = loop.prelude(zeros, row, position)

    def recur() -> None:
        loop.attention.plan(Rows(loop.requests.table, row, position, zeros))
        s.copy_(loop.recur(loop.parts, e, e.clone(), position, zeros > 0, zeros))

    def read() -> None:
        loop.head(loop.parts, coda(loop, s, row, position))
        e.copy_(loop.prelude(zeros, row, position))

    s, steps = e.clone(), (recur, read)
    if loop.masked and n <= loop.masked.most:
        steps = tuple(loop.masked.graphs(padded(n), padded(n)))
    spent = 0.0
    for done in range(REPEATS + 1):
        if done > 1 and spent > SECONDS:
            return
        start = time.perf_counter()
        steps[0]()
        s[:1, 0].tolist()  # the device has got so far
        between = time.perf_counter()
        steps[1]()
        s[:1, 0].tolist()
        end = time.perf_counter()
        spent += end - start
        yield between - start, end - between
