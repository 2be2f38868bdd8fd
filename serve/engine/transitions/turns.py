"""Rows take turns where a pass has no room for all of their lanes.

Shapes: n lanes that run.
"""

from __future__ import annotations

from torch import Tensor

from ..state import State


def nearest(state: State, decodes: Tensor, width: int) -> Tensor:
    """At most about `width` of the decode lanes [n]: those nearest to their row's next token, rows in turn. Writes
    `turn`."""
    rows, row = state.config.max_num_seqs, state.lanes.row[decodes]
    # No position overtakes an earlier one.
    ahead = state.lanes.position[decodes] - state.requests.next_position[row]
    together = state.requests.refines[row]
    order = (ahead.masked_fill(together, 0) * rows + (row - state.turn[0]) % rows).argsort(stable=True)
    chosen = decodes[order[:width]]
    cut = state.lanes.row[decodes[order[width]]]  # a diffusion runs whole, or waits
    if state.requests.refines[cut] and len(partial := (state.lanes.row[chosen] == cut).nonzero()):
        chosen = chosen[: int(partial[0])] if int(partial[0]) else decodes[row == cut]
    state.turn[1] = (state.lanes.row[chosen[-1]] + 1) % rows
    return chosen.sort().values
