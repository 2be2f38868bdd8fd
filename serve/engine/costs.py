"""Measured costs of a pass of the core and of a read-out: how many lanes are nearly free, and how long exits should
wait for others that are read out with them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from statistics import linear_regression
from typing import NamedTuple

import torch

from .attention.base import Rows
from .forward import Forward
from .state import State

SLOWER = 1.5  # up to the knee, a pass takes at most so many times the time of a pass of one lane
REPEATS, SECONDS = 5, 0.5  # repetitions of each size, and the time after which they end
MOST, POSITIONS = 1024, 32  # lanes, and positions of a row among them: as many as the widest wave has


class Costs(NamedTuple):
    """Seconds by number of lanes: passes of the core, and read-outs (coda, head, and the next tokens' prelude)."""

    passes: dict[int, float]
    reads: dict[int, float]

    def knee(self) -> int:
        """The greatest number of lanes that is nearly free, for a pass with a read-out of all of them."""
        whole = {n: seconds + self.reads[n] for n, seconds in self.passes.items()}
        best = min(whole)
        for n in sorted(whole):
            if whole[n] > SLOWER * whole[min(whole)]:
                break
            best = n
        return best

    def of_pass(self, lanes: int) -> float:
        """Seconds of a pass of so many lanes."""
        return _fixed(self.passes, lanes)[1]

    def of_read(self, lanes: int) -> float:
        """Seconds of a read-out of so many lanes."""
        return _fixed(self.reads, lanes)[1]

    def patience(self, lanes: float, reads: float, depth: float) -> int:
        """The most passes that an exit should wait, for passes of so many `lanes`, `reads` exits a pass, and positions
        of a mean `depth`.

        Let a pass of n lanes take a + b n, a read-out of m lanes c + d m, and read-outs be k passes apart. Of L
        resident requests L E / (E + (k - 1) / 2) run. So L tokens take a k / 2 + c (E - 1/2) / k and a part without k,
        which is least at k = sqrt((2 E - 1) c / a). After E passes all exits of one depth have met, so no wait is
        longer.
        """
        fixed, whole = _fixed(self.passes, lanes)
        read = _fixed(self.reads, reads)[0]
        every = math.sqrt(max(2 * depth - 1, 0) * read / max(fixed, whole / 100))
        return max(round(min(every, depth)) - 1, 0)


def _fixed(times: dict[int, float], n: float) -> tuple[float, float]:
    """The part of the time at n that does not grow with n, and all of it.

    A line is fitted to the sizes from n / 4 to the one above n, as single measurements scatter.
    """
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


Steps = tuple[Callable[[], object], Callable[[], object]]


@torch.inference_mode()
def measure(
    state: State,
    forward: Forward,
    recorded: Callable[[int], Steps | None] | None = None,
    agree: Callable[[float], float] = lambda seconds: seconds,
) -> Costs:
    """Measure on a State without requests, whose block tables may be written through.

    recorded: graphs of a pass and a read-out of n lanes, where there are some.   agree: makes several ranks that
    measure together go by the same times.
    """
    rows = state.config.max_num_seqs
    most = min(rows * min(state.config.max_in_flight, state.config.max_model_len, POSITIONS), MOST)
    sizes = sorted({n for k in range(11) for n in (2**k, 3 * 2**k // 2) if n <= most} | {most})
    costs = Costs({}, {})
    for n in sizes:
        if n > rows and costs.knee() < max(costs.passes):
            break  # wider than any pass of plain requests, and behind the knee
        seconds = torch.tensor(list(_samples(state, forward, recorded and recorded(n), n, agree)))[1:]
        costs.passes[n], costs.reads[n] = (agree(min(part)) for part in seconds.T.tolist())
    return costs


def _samples(
    state: State, forward: Forward, recorded: Steps | None, n: int, agree: Callable[[float], float]
) -> Iterator[tuple[float, float]]:
    """Seconds of a pass of n lanes and of a read-out of them, again and again; the first pair warms up.

    agree: as in `measure`. Ranks that reduce together must end after the same pass.
    """
    every = torch.arange(n, device=state.device)
    row = every * min(state.config.max_num_seqs, n) // n
    position = every - torch.searchsorted(row, row)
    zeros = torch.zeros_like(row)
    e = forward.prelude(zeros, row, position)

    def recur() -> None:
        forward.plan(Rows(forward.block_table, row, position, zeros))
        s.copy_(forward.recur(e, e.clone(), position, zeros > 0, zeros + 1, zeros))

    def read() -> None:
        forward.head(forward.read_out(s, row, position))
        e.copy_(forward.prelude(zeros, row, position))

    s, (run_pass, run_read) = e.clone(), recorded or (recur, read)
    spent = 0.0
    for done in range(REPEATS + 1):
        if done > 1 and spent > SECONDS:
            return
        start = time.perf_counter()
        run_pass()
        s[:1, 0].tolist()  # waits for the device
        between = time.perf_counter()
        run_read()
        s[:1, 0].tolist()
        end = time.perf_counter()
        spent += agree(end - start)
        yield between - start, end - between
