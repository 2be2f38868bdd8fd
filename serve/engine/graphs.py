"""Passes of the core as CUDA graphs: one launch for a whole pass, whatever the host does.

A graph is recorded for a number of rows and replays the same kernels on the same memory. So passes are padded to one of
a few sizes, and what a pass is told goes through tensors that stay. Only attention's plan and the recurrence are
recorded; what decides which lanes run, at which slots and places, and what becomes of their states stays outside.
Shapes: n lanes of a pass, N >= n rows of a graph, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .attention import Rows

if TYPE_CHECKING:
    from .loop import Loop

MOST = 256  # rows of a graph: the host does not hold up wider passes

# A function without arguments and results -> another that does the same again, on the same tensors
Record = Callable[[Callable[[], None]], Callable[[], Any]]


def padded(n: int) -> int:
    """The number of rows that n lanes are padded to: 1, 2, 4, 8, then multiples of 8 up to 64, then of 32."""
    if n <= 8:
        return 1 << (n - 1).bit_length()
    step = 8 if n <= 64 else 32
    return -(-n // step) * step


class Graphs:
    """Stands for a loop's `attention.plan` and `recur`, with the same results up to rounding: a matrix product of more
    rows may add up in another order.

    A graph is recorded when a pass of its size comes up first, by `record`. Where that raises a RuntimeError, as when
    a model's layers wait for the device, there is a warning, and passes run without graphs from then on. With
    parameters of a depth's own, which are looked up row by row, they do from the start. LoRA waits for nothing; but
    prompts that pass on their own for it (`loop.recur_alike`) are not for graphs.
    """

    def __init__(self, loop: Loop, record: Record, most: int = MOST):
        self.loop, self.record, self.most = loop, record, most if loop.parts.compilable else 0
        room, device, s = padded(most), loop.device, loop.lanes.s
        self.numbers = torch.zeros(5, room, dtype=torch.long, device=device)  # request, place, slot, position, depth
        self.flags = torch.zeros(2, room, dtype=torch.bool, device=device)  # begun, write
        self.s, self.e = torch.zeros(2, room, s.shape[1], dtype=s.dtype, device=device)
        self.replays: dict[tuple[int, bool], Callable[[], Any]] = {}  # by N, and whether rows are alone
        self.plans: dict[tuple[int, bool], Any] = {}

    def fit(self, n: int) -> bool:
        """Whether n lanes are few enough."""
        return n <= self.most

    def __call__(
        self,
        rows: Rows,
        s: torch.Tensor,
        e: torch.Tensor,
        position: torch.Tensor,
        begun: torch.Tensor,
        depth: torch.Tensor,
    ) -> tuple[Any, torch.Tensor]:
        """What attention planned for `rows`, for a fill before the next call, and the new states [n, D]. The rest: as
        in parts.recur."""
        n = len(s)
        key = padded(n), rows.alone
        if key not in self.replays:
            self._add(*key)
        # Other rows write nothing, and read as little as there is: position 0 of request 0. Two of them are no run.
        self.numbers[:, n : key[0]] = 0
        self.flags[:, n : key[0]] = False
        self.numbers[:, :n] = torch.stack([rows.request, rows.position, rows.slot, position, depth])
        self.flags[0, :n] = begun
        self.flags[1, :n] = True if rows.write is None else rows.write
        self.s[:n], self.e[:n] = s, e
        self.replays[key]()
        return self.plans[key], self.s[:n].clone()  # the next call writes there

    def _add(self, size: int, alone: bool) -> None:
        """Record a pass of `size` rows that write nothing, as recording may run it."""
        loop, key = self.loop, (size, alone)
        request, place, slot, position, depth = self.numbers[:, :size]
        begun, write = self.flags[:, :size]
        s, e = self.s[:size], self.e[:size]
        rows = Rows(loop.requests.table, request, place, slot, write, alone, loop.policy.fills)

        def run() -> None:
            self.plans[key] = loop.attention.plan(rows)
            # Back to where it came from, outside of the memory that graphs share: they may replay in any order.
            s.copy_(loop.recur(loop.parts, s, e, position, begun, depth))

        self.numbers[:, :size] = 0
        self.flags[:, :size] = False
        try:
            self.replays[key] = self.record(run)
        except RuntimeError as error:
            warnings.warn(f"passes run without CUDA graphs, as one of {size} lanes has none: {error}", stacklevel=2)
            self.replays[key], self.most = run, 0


def on_cuda(device: torch.device) -> Record:
    """`record` for tensors of this device, whose graphs share memory for what is computed on the way."""
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[], None]) -> Callable[[], Any]:
        """Raises RuntimeError where the function waits for the device."""
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function()  # compiles and loads kernels, which no capture could
                before = torch.cuda.get_sync_debug_mode()
                torch.cuda.set_sync_debug_mode("error")  # before a capture, which would be left broken
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
