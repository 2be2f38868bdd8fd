"""The model in pieces, over rows of any requests, positions and depths. Knows no lanes.

Shapes: N rows of a call, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...model.initial_state import initial_state
from ...model.recurrence_norm import norm_after, norm_at_end, norm_before
from .attention.base import Attention, Rows
from .compile import compiled
from .parts import Parts
from .pieces import embed, head, logits


def recur(parts: Parts, s: Tensor, e: Tensor, position: Tensor, begun: Tensor, limit: Tensor, depth: Tensor) -> Tensor:
    """One recurrence: s, e [N, D] -> s [N, D].

    begun [N]: the row has recurred before.   limit [N]: its R.   depth [N]: number of this recurrence, from 0; [1]: the
    same for all rows.
    """
    kind = parts.config.recurrence_norm
    s = norm_before(kind, s, parts.norm_between, begun)
    y = parts.layers("core", parts.injection(s, e), position, depth, limit)
    return norm_after(kind, parts.damping(s, y, begun, limit), parts.norm_each)


def recur_alike(parts: Parts, *inputs: Tensor) -> Tensor:
    """`recur` for rows that are all at one depth, with the same inputs."""
    return recur(parts, *inputs[:-1], depth=inputs[-1][:1])


class Forward:
    """`parts` with their attention and the requests' block tables [requests, B]; compiled where wanted and possible.

    recur, recur_alike, embed, logits, head: the functions on these parts; attention is planned beforehand.
    """

    def __init__(self, parts: Parts, attention: Attention, block_table: Tensor, positions: int, compile: bool = False):
        """positions: most positions of a request."""
        self.parts, self.attention, self.block_table = parts, attention, block_table
        # Token of every position that has started, by request; only for layers that embed them.
        self.tokens = block_table.new_zeros(len(block_table), positions if parts.needs_tokens else 0)
        compile = compile and parts.compilable
        self.recur: Callable[..., Tensor] = partial(compiled(recur) if compile else recur, parts)
        self.recur_alike: Callable[..., Tensor] = partial(compiled(recur_alike) if compile else recur_alike, parts)
        self.logits: Callable[[Tensor], Tensor] = partial(compiled(logits) if compile else logits, parts)
        self.head: Callable[[Tensor], tuple[Tensor, Tensor]] = partial(compiled(head) if compile else head, parts)
        self.embed: Callable[[Tensor, Tensor], Tensor] = partial(compiled(embed) if compile else embed, parts)
        self.has_lora = bool((parts.config.relaxation or {}).get("rank"))

    def prelude(self, tokens: Tensor, row: Tensor, position: Tensor, only: Tensor | None = None) -> Tensor:
        """e [N, D] for tokens [N] of rows at positions [N]. Plans attention.

        only [N]: the real ones among padded tokens; no two of them belong to one row.
        """
        x = self.embed(tokens, position)
        if self.parts.needs_tokens:
            self.tokens[row, position] = tokens.to(self.tokens.dtype)
        if self.parts.config.prelude:
            self._plan(row, position, only)
            x = self.parts.layers("prelude", x, position)
        return self.parts.ends.enter(x)

    def plan(self, rows: Rows) -> Any:
        """Prepare for calls with `rows`; see Attention.plan, whose plan is returned."""
        if self.parts.needs_tokens:
            self.parts.tokens = self.tokens[rows.request, rows.position]
        return self.attention.plan(rows)

    def initial_state(self, e: Tensor, position: Tensor) -> Tensor:
        """s_0 [N, D]. All requests have one sequence id, as transformers has by default: noise depends on the position
        alone."""
        return initial_state(self.parts.config, e[None], position[None], None)[0]

    def read_out(self, s: Tensor, row: Tensor, position: Tensor, only: Tensor | None = None) -> Tensor:
        """The head's input [N, D] for states s [N, D] of rows at positions [N], a row's in order. Plans attention.

        only: as in `prelude`.
        """
        config = self.parts.config
        if config.coda:
            self._plan(row, position, only)
        s = norm_at_end(config.recurrence_norm, s, self.parts.norm_between)
        return self.parts.layers("coda", self.parts.ends.leave(s), position)

    def _plan(self, row: Tensor, position: Tensor, only: Tensor | None) -> None:
        """Plan a call of prelude or coda, which have one slot."""
        self.plan(Rows(self.block_table, row, position, torch.zeros_like(row), only, alone=only is not None))
