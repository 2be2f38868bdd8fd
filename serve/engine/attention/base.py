"""The rows of an attention call, and the protocol of a backend.

Every (request, depth) is a virtual sequence: a request has one block table, and the blocks of another depth lie a
constant number of blocks further on. Rows of one request at one depth and at neighboring positions, such as a prompt's,
form one *run* of queries.
Shapes: N rows, H query heads, K key-value heads, C head size, M runs, B blocks of a request.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass
class Rows:
    """The rows of one call.

    tables [requests, B]: block tables.   request, position, slot [N]: of each row.   write [N]: the row writes its keys
    and values; None: every row does.   alone: no two rows belong to one request.   fills: `fill` may follow, for rows
    that write.   moved: (an earlier plan, slots): the same rows, so many slots further on.   longest: an upper bound of
    the positions that a row attends to; 0: unknown.
    """

    tables: Tensor
    request: Tensor
    position: Tensor
    slot: Tensor
    write: Tensor | None = None
    alone: bool = False
    fills: bool = False
    moved: tuple[Any, int] | None = None
    longest: int = 0

    def part(self, some: slice) -> Rows:
        """The rows in a slice, of a call that is not moved."""
        write = None if self.write is None else self.write[some]
        ours = {"request": self.request[some], "position": self.position[some], "slot": self.slot[some]}
        return replace(self, **ours, write=write)


class Attention(Protocol):
    """A backend. Layers are numbered prelude, coda, core, as the config's key-value slots."""

    def plan(self, rows: Rows) -> Any:
        """Prepare for calls with `rows`; those of one request at one slot stand together, in order of position.

        The plan stays in force until the next one. Returns it, for `fill`.
        """
        ...

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **facts: Any) -> Tensor:
        """Write k, v [N, K, C], then attend with q [N, H, C] to the row's own position and all before: [N, H, C].

        `facts` of the layer: scaling, sliding_window, softcap, sinks [H].
        """
        ...

    def fill(self, plan: Any, empty: Tensor, count: int | None = None) -> None:
        """Copy the keys and values that the rows of `plan` had in the core layers into the next `empty` [N] slots, too.

        `count`: the sum of `empty`, where the caller knows it.
        """
        ...

    def clean(self, table: Tensor) -> None:
        """Set keys and values that are not finite to 0, in every slot of the blocks `table` [B].

        The next owner of a block gives masked keys the weight 0, and 0 * NaN is NaN.
        """
        ...


def clean(cache: Tensor, table: Tensor, shifts: Iterable[int]) -> None:
    """Set the values that are not finite to 0, in the blocks `table` [B] of a cache [all blocks, ...], and in those
    each of `shifts` behind."""
    for shift in shifts:
        cache[table + shift] = cache[table + shift].nan_to_num(0.0, 0.0, 0.0)


def runs(rows: Rows) -> tuple[Tensor, Tensor]:
    """First row [M] and number of rows [M] of every run."""
    request, position, slot = rows.request, rows.position, rows.slot
    new = torch.ones_like(request, dtype=torch.bool)
    new[1:] = (request[1:] != request[:-1]) | (slot[1:] != slot[:-1]) | (position[1:] != position[:-1] + 1)
    first = new.nonzero().squeeze(1)
    return first, torch.diff(first, append=first.new_tensor([len(request)]))


def slots_after(empty: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
    """The row, and the number behind its own from 1, of each of the `empty` [N] slots; `every` is 0, 1, ... for
    each."""
    ends = empty.cumsum(0)
    rows = torch.searchsorted(ends, every, right=True)
    return rows, every - (ends - empty)[rows] + 1
