"""A pass of the core over rows: all at once, or prompts apart where LoRA makes that cheaper; by graphs where they fit.

Shapes: n lanes of a pass, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention.base import Rows
from .forward import Forward
from .graphs import Graphs
from .state import State
from .tick import Chunk, Counts

PROMPT = 64  # prompt lanes, all at one depth, that are worth a pass of their own: they share one LoRA


class Passes:
    """Runs passes, and counts them."""

    def __init__(self, state: State, forward: Forward, counts: Counts):
        self.state, self.forward, self.counts = state, forward, counts
        self.graphs: Graphs | None = None  # passes that fit are replayed

    def mixed(self, which: Tensor, prompts: bool) -> int:
        """The number of lanes `which` [n] that pass together, from the first on; prompt lanes behind them, all at one
        depth, have a pass of their own where LoRA makes that cheaper."""
        if not (self.forward.has_lora and prompts):
            return len(which)
        decodes = int((which < self.state.num_decode_lanes).sum())
        return decodes if len(which) - decodes >= PROMPT else len(which)

    def __call__(self, rows: Rows, mixed: int, *inputs: Tensor) -> tuple[list[Any], Tensor]:
        """A pass over the first `mixed` of `rows`, and one over the others; `inputs` as in forward.recur. Returns
        attention's plan of each, and the new states [n, D]."""
        n = len(rows.request)
        if 0 < mixed < n:
            first, rest = slice(0, mixed), slice(mixed, n)
            plans, decodes = self(rows.part(first), mixed, *(each[first] for each in inputs))
            more, prompts = self(rows.part(rest), 0, *(each[rest] for each in inputs))
            return plans + more, torch.cat([decodes, prompts])
        self.counts.passes[n] += 1
        if mixed and self.graphs and self.graphs.fits(n):
            plan, after = self.graphs(rows, *inputs)
        else:
            plan = self.forward.plan(rows)
            after = (self.forward.recur if mixed else self.forward.recur_alike)(*inputs)
        return [plan], after

    def fill(self, plans: list[Any], empty: Tensor, mixed: int, total: int) -> None:
        """Fill the `empty` [n] slots, `total` in all, that early exits left behind the rows of `plans`."""
        parts = empty.split([n for n in (mixed, len(empty) - mixed) if n])
        slots = [total] if len(parts) == 1 else torch.stack([some.sum() for some in parts]).tolist()
        for plan, some, count in zip(plans, parts, slots, strict=True):
            if count:
                self.forward.attention.fill(plan, some, count)


def through_of(chunks: list[Chunk], running: Tensor, forward: Forward) -> list[Chunk]:
    """The chunks of prompts that can be read out, as all their lanes have left.

    running [lanes]: the lane has not left. A coda reads the keys of its own layers at earlier positions. So a chunk
    waits for those before it that begin with the same block: it may share blocks that they fill in this step.
    """
    done = [not bool(running[chunk.first : chunk.last].any()) for chunk in chunks]
    if not forward.parts.config.coda or len(set(done)) < 2:
        return [chunk for chunk, is_done in zip(chunks, done, strict=True) if is_done]
    begins = forward.block_table[[chunk.row for chunk in chunks], 0].tolist()
    through, unread = list[Chunk](), set[int]()
    for chunk, is_done, block in zip(chunks, done, begins, strict=True):
        if is_done and block not in unread:
            through.append(chunk)
        else:
            unread.add(block)
    return through
