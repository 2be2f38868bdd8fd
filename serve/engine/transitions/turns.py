"""Rows take turns where a pass has no room for all of their lanes.

Shapes: n lanes that run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..request import NEVER
from ..state import State


def nearest(state: State, decodes: Tensor, width: int) -> Tensor:
    """At most about `width` of the decode lanes [n]: those nearest to their row's next token, rows in turn. Writes
    `turn`."""
    rows, row = state.config.max_num_seqs, state.lanes.row[decodes]
    order = _rank(state, decodes).argsort(stable=True)
    chosen = decodes[order[:width]]
    cut = state.lanes.row[decodes[order[width]]]  # a diffusion runs whole, or waits
    if state.requests.refines[cut] and len(partial := (state.lanes.row[chosen] == cut).nonzero()):
        chosen = chosen[: int(partial[0])] if int(partial[0]) else decodes[row == cut]
    state.turn[1] = (state.lanes.row[chosen[-1]] + 1) % rows
    return chosen.sort().values


def ordered(state: State, order: Tensor, runs: Tensor, width: int) -> Tensor:
    """As `nearest`, without the host and without diffusions: decode lanes [n], of which the first `runs` [] run, with
    those in front that a pass of `width` rows takes."""
    rank = torch.where(torch.arange(len(order), device=order.device) < runs, _rank(state, order), NEVER)
    order = order[rank.argsort(stable=True)]
    end = min(width, len(order))
    following = (state.lanes.row[order[end - 1 : end]] + 1) % state.config.max_num_seqs  # an index [] would wait
    state.turn[1:].copy_(torch.where(runs > width, following, state.turn[0]))
    return order


def _rank(state: State, decodes: Tensor) -> Tensor:
    """A number [n] by which lanes [n] are sorted: no position overtakes an earlier one."""
    rows, row = state.config.max_num_seqs, state.lanes.row[decodes]
    ahead = state.lanes.position[decodes] - state.requests.next_position[row]
    return ahead.masked_fill(state.requests.refines[row], 0) * rows + (row - state.turn[0]) % rows
