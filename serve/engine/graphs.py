"""Passes of the core as CUDA graphs: one launch for a whole pass, however slow the host is.

A graph is recorded for a number of rows and replays the same kernels on the same memory. So passes are padded to one of
a few sizes, and their inputs go through tensors that stay. Only attention's plan and the recurrence are recorded; the
choice of lanes, slots and places, and the writing of states stay outside.
Shapes: n lanes of a pass, N >= n rows of a graph, D hidden size.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention.base import Rows
from .forward import Forward
from .loop_config import MAX_ROWS
from .state import State

CACHE = 64  # graphs that are kept
TRIES = 3  # captures that may fail, if none succeeds, before graphs are given up

# A function without arguments and results -> another that does the same again, on the same tensors.
Record = Callable[[Callable[[], None]], Callable[[], Any]]


def sizes(most: int) -> list[int]:
    """The numbers of rows that up to `most` lanes are padded to, the largest first."""
    return sorted({padded(n) for n in range(1, most + 1)}, reverse=True)


def reserved_bytes(rows: int, vocabulary: int) -> int:
    """An estimate of the memory that a full cache of graphs holds, for read-outs of up to `rows` lanes.

    The pool that graphs share has room for the widest: seven float64 tensors [rows, V] of `sampling.sample`, and the
    logits. Each graph has its nodes beside it. Not measured yet: bench/graphs.py does so on a GPU.
    """
    return min(rows, MAX_ROWS) * vocabulary * (7 * 8 + 4) + CACHE * (2 << 20)


def padded(n: int) -> int:
    """The number of rows that n lanes are padded to: 1, 2, 4, 8, then multiples of 8 up to 64, then of 32."""
    if n <= 8:
        return 1 << (n - 1).bit_length()
    step = 8 if n <= 64 else 32
    return -(-n // step) * step


class GraphCache:
    """Graphs by owner and key, made by `record`; of all owners, the `most` that were used last are kept.

    A function that cannot be recorded (RuntimeError: a layer waits for the device, or memory lacks) runs as it is. That
    concerns its key alone. Where none of the first functions can be recorded, `max_rows` becomes 0: no more is tried.
    """

    def __init__(self, record: Record, most: int = CACHE, max_rows: int = MAX_ROWS):
        self.record, self.most, self.max_rows = record, most, max_rows
        self.used: OrderedDict[tuple[int, Any], dict[Any, Callable[[], Any]]] = OrderedDict()  # the oldest first
        self.captures, self.failures = 0, 0

    def get(self, replays: dict[Any, Callable[[], Any]], key: Any, rows: int, run: Callable[[], None]) -> Any:
        """The replay of `run`, a function of `rows` rows, in an owner's `replays`. Records it there if it is new, and
        then removes the graph that was used least recently, of any owner."""
        if new := key not in replays:
            replays[key] = self._recorded(run, rows)
        self.used[id(replays), key] = replays
        self.used.move_to_end((id(replays), key))
        while new and len(self.used) > self.most:
            (_, old), owner = self.used.popitem(last=False)
            owner.pop(old, None)
        return replays[key]

    def _recorded(self, run: Callable[[], None], rows: int) -> Callable[[], Any]:
        try:
            replay = self.record(run)
            self.captures += 1
            return replay
        except RuntimeError as error:
            self.failures += 1
            warnings.warn(
                f"CUDA graph capture failed at {rows} lanes; such passes run without a graph: {error}", stacklevel=2
            )
            if not self.captures and self.failures == TRIES:
                self.max_rows = 0
            return run


class Graphs:
    """Stands in for `Forward.plan` and `Forward.recur`, with the same results up to rounding: a matrix product of
    more rows may add up in another order.

    A graph is recorded when a pass of its size first comes up. Parameters of a depth's own are looked up row by row, so
    models with them run without graphs, as do prompts that pass by `Forward.recur_alike`.
    """

    def __init__(self, state: State, forward: Forward, cache: GraphCache, max_rows: int = MAX_ROWS):
        self.state, self.forward, self.cache = state, forward, cache
        self.max_rows = max_rows if forward.parts.compilable else 0
        room, device, s = padded(max_rows), state.device, state.lanes.s
        # request, place, slot, position, limit, depth
        self.numbers = torch.zeros(6, room, dtype=torch.long, device=device)
        self.flags = torch.zeros(2, room, dtype=torch.bool, device=device)  # begun, write
        self.s, self.e = torch.zeros(2, room, s.shape[1], dtype=s.dtype, device=device)
        self.replays: dict[tuple[int, bool], Callable[[], Any]] = {}  # by N, and Rows.alone
        self.plans: dict[tuple[int, bool], Any] = {}

    def fits(self, n: int) -> bool:
        """n lanes are few enough."""
        return n <= min(self.max_rows, self.cache.max_rows)

    def __call__(
        self, rows: Rows, s: Tensor, e: Tensor, position: Tensor, begun: Tensor, limit: Tensor, depth: Tensor
    ) -> tuple[Any, Tensor]:
        """A pass of `rows`, with the inputs of `forward.recur`. Returns attention's plan, for a fill before the next
        call, and the new states [n, D]."""
        n = len(s)
        key = padded(n), rows.alone
        replay = self._replay(*key)
        # Padding rows write nothing, and read position 0 of request 0. No two of them form a run.
        self.numbers[:, n : key[0]] = 0
        self.flags[:, n : key[0]] = False
        self.numbers[:, :n] = torch.stack([rows.request, rows.position, rows.slot, position, limit, depth])
        self.flags[0, :n] = begun
        self.flags[1, :n] = True if rows.write is None else rows.write
        self.s[:n], self.e[:n] = s, e
        replay()
        return self.plans[key], self.s[:n].clone()  # the next call overwrites self.s

    def _replay(self, size: int, alone: bool) -> Callable[[], Any]:
        """The replay of a pass of `size` rows. It is recorded with rows that write nothing, as recording may run it."""
        forward, key = self.forward, (size, alone)
        request, place, slot, position, limit, depth = self.numbers[:, :size]
        begun, write = self.flags[:, :size]
        s, e = self.s[:size], self.e[:size]
        rows = Rows(forward.block_table, request, place, slot, write, alone, self.state.policy.fills)

        def run() -> None:
            self.plans[key] = forward.plan(rows)
            # The result goes to memory outside of the graphs' shared pool: graphs replay in any order.
            s.copy_(forward.recur(s, e, position, begun, limit, depth))

        if key not in self.replays:
            self.numbers[:, :size] = 0
            self.flags[:, :size] = False
        return self.cache.get(self.replays, key, size, run)


def on_cuda(device: torch.device) -> Record:
    """`record` for tensors of this device; its graphs share one memory pool for intermediate results."""
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[], None]) -> Callable[[], Any]:
        """Raises RuntimeError where the function waits for the device."""
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # the cache may drop a graph for this one, which must not run then
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function()  # compiles and loads kernels, which a capture cannot do
                before = torch.cuda.get_sync_debug_mode()
                torch.cuda.set_sync_debug_mode("error")  # before the capture, which a wait would leave broken
                try:
                    function()
                finally:
                    torch.cuda.set_sync_debug_mode(before)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                function()
        return graph.replay

    return record
