"""The exact wave: positions of one request in flight at staggered depths, whose tokens are those of plain decoding.

A lane is read out when it leaves, and before that at the depths at which its request drafts. The next position starts
from the draft token of the first of these, that many passes behind. So it finds the KV entries of every depth that it
needs. When a later read-out changes the draft, all positions to its right are dropped and start anew. A token is put
out once its lane has exited and was read out since, and all tokens before it are out: then the lane started from the
right token, and attended to the right KV entries.
Shapes: m rows with a wave, W the greatest width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..state import State
from ..transitions import windows
from ..transitions.drafts import allowed_widths


class Start(NamedTuple):
    """The position that each row [m] starts next. where: its lane.   there: it starts.   row, position, token: its
    own.   stopped: the row's request has ended. For rows without a start, the first four are those of the spare
    lane."""

    where: Tensor
    there: Tensor
    row: Tensor
    position: Tensor
    token: Tensor
    stopped: Tensor


def advance(state: State, rows: Tensor) -> Start:
    """After a read-out of the waves of `rows` [m]: drop the lanes that stand on a changed token, put out the certain
    ones, and find the positions that start. Changes nothing for rows that were not read out, and for the spare one."""
    lanes, requests, spare = state.lanes, state.requests, state.config.max_num_seqs
    offsets = torch.arange(state.config.max_in_flight, device=rows.device)
    first, real = requests.next_position[rows], requests.live[rows] & (rows < spare)
    position, row = first[:, None] + offsets, rows[:, None]
    lane = torch.where(real[:, None], state.lane_of(row, position), state.spare)
    there = real[:, None] & lanes.uncommitted[lane] & (lanes.position[lane] == position)
    draft, token = lanes.draft_token[lane], lanes.token[lane]
    follows = torch.nn.functional.pad(token[:, 1:] == draft[:, :-1], (1, 0), value=True)
    right = (there & follows).long().cumprod(1).bool()
    certain = (right & lanes.exited[lane] & ~lanes.waiting[lane]).long().cumprod(1).bool()
    windows.drop(state, lane, there & ~right)
    stopped = windows.commit(state, rows, lane, draft, certain)
    last = right.sum(1)
    position, token = first + last, draft.gather(1, (last - 1).clamp(min=0)[:, None]).squeeze(1)
    going = real & ~stopped & (last > 0) & (token >= 0) & (position < state.config.max_model_len)
    going = going & (position - requests.next_position[rows] < allowed_widths(state)[rows])
    where = torch.where(going, state.lane_of(rows, position), state.spare)
    row, position = torch.where(going, rows, spare), torch.where(going, position, 0)
    return Start(where, going, row, position, token.clamp(min=0), stopped)


def lane_budget(state: State, decodes: Tensor, budget: int) -> int:
    """Lanes of a pass, of decode lanes [n]: all certain ones, and others up to `budget`."""
    lanes, requests = state.lanes, state.requests
    row = lanes.row[decodes]
    certain = (lanes.position[decodes] <= requests.next_position[row]) | requests.refines[row]
    return max(budget, int(certain.sum()))
