"""Passes of the core as CUDA graphs: one launch for a whole pass, however slow the host is.

A graph is recorded for a number of rows and replays the same kernels on the same memory. So passes are padded to one of
a few sizes, and their inputs go through tensors that stay. Only attention's plan and the recurrence are recorded; the
choice of lanes, slots and places, and the writing of states stay outside.
Shapes: n lanes of a pass, N >= n rows of a graph, D hidden size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention.base import Rows
from .forward import Forward
from .state import State

MAX_ROWS = 256  # rows of a graph: wider passes keep the device busy without one

# A function without arguments and results -> another that does the same again, on the same tensors.
Record = Callable[[Callable[[], None]], Callable[[], Any]]


def padded(n: int) -> int:
    """The number of rows that n lanes are padded to: 1, 2, 4, 8, then multiples of 8 up to 64, then of 32."""
    if n <= 8:
        return 1 << (n - 1).bit_length()
    step = 8 if n <= 64 else 32
    return -(-n // step) * step


class Recorder:
    """Records functions by `record`. After a RuntimeError, as when a layer waits for the device, it warns once, and
    functions run as they are."""

    def __init__(self, record: Record, max_rows: int):
        self.record, self.max_rows = record, max_rows

    def fits(self, rows: int) -> bool:
        """So many rows are few enough for a graph."""
        return rows <= self.max_rows

    def __call__(self, run: Callable[[], None], rows: int) -> Callable[[], Any]:
        """A replay of `run`, a function of `rows` rows; `run` itself where it cannot be recorded."""
        try:
            return self.record(run)
        except RuntimeError as error:
            warnings.warn(
                f"CUDA graph capture failed at {rows} lanes; continuing without graphs: {error}", stacklevel=2
            )
            self.max_rows = 0
            return run


class Graphs:
    """Stands in for `attention.plan` and `Forward.recur`, with the same results up to rounding: a matrix product of
    more rows may add up in another order.

    A graph is recorded when a pass of its size first comes up. Parameters of a depth's own are looked up row by row, so
    models with them run without graphs, as do prompts that pass by `Forward.recur_alike`.
    """

    def __init__(self, state: State, forward: Forward, record: Record, max_rows: int = MAX_ROWS):
        self.state, self.forward = state, forward
        self.recorder = Recorder(record, max_rows if forward.parts.compilable else 0)
        room, device, s = padded(max_rows), state.device, state.lanes.s
        # request, place, slot, position, limit, depth
        self.numbers = torch.zeros(6, room, dtype=torch.long, device=device)
        self.flags = torch.zeros(2, room, dtype=torch.bool, device=device)  # begun, write
        self.s, self.e = torch.zeros(2, room, s.shape[1], dtype=s.dtype, device=device)
        self.replays: dict[tuple[int, bool], Callable[[], Any]] = {}  # by N, and Rows.alone
        self.plans: dict[tuple[int, bool], Any] = {}

    def fits(self, n: int) -> bool:
        """n lanes are few enough."""
        return self.recorder.fits(n)

    def __call__(
        self, rows: Rows, s: Tensor, e: Tensor, position: Tensor, begun: Tensor, limit: Tensor, depth: Tensor
    ) -> tuple[Any, Tensor]:
        """A pass of `rows`, with the inputs of `forward.recur`. Returns attention's plan, for a fill before the next
        call, and the new states [n, D]."""
        n = len(s)
        key = padded(n), rows.alone
        if key not in self.replays:
            self._add(*key)
        # Padding rows write nothing, and read position 0 of request 0. No two of them form a run.
        self.numbers[:, n : key[0]] = 0
        self.flags[:, n : key[0]] = False
        self.numbers[:, :n] = torch.stack([rows.request, rows.position, rows.slot, position, limit, depth])
        self.flags[0, :n] = begun
        self.flags[1, :n] = True if rows.write is None else rows.write
        self.s[:n], self.e[:n] = s, e
        self.replays[key]()
        return self.plans[key], self.s[:n].clone()  # the next call overwrites self.s

    def _add(self, size: int, alone: bool) -> None:
        """Record a pass of `size` rows that write nothing, as recording may run it."""
        forward, key = self.forward, (size, alone)
        request, place, slot, position, limit, depth = self.numbers[:, :size]
        begun, write = self.flags[:, :size]
        s, e = self.s[:size], self.e[:size]
        rows = Rows(forward.block_table, request, place, slot, write, alone, self.state.policy.fills)

        def run() -> None:
            self.plans[key] = forward.attention.plan(rows)
            # The result goes to memory outside of the graphs' shared pool: graphs replay in any order.
            s.copy_(forward.recur(s, e, position, begun, limit, depth))

        self.numbers[:, :size] = 0
        self.flags[:, :size] = False
        self.replays[key] = self.recorder(run, size)


def on_cuda(device: torch.device) -> Record:
    """`record` for tensors of this device; its graphs share one memory pool for intermediate results."""
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[], None]) -> Callable[[], Any]:
        """Raises RuntimeError where the function waits for the device."""
        with torch.cuda.device(device):
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
