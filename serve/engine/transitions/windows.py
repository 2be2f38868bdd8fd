"""The decoders wave and diffusion move their windows.

Shapes: m lanes or rows, W positions of a wave, n positions of a diffusion's window, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..request import NEVER
from ..state import State
from .steps import start_lanes


@torch.inference_mode()
def set_budget(state: State, lanes: int) -> None:
    """Waves may fill a pass up to so many lanes; 0: no bound."""
    state.budget.fill_(lanes)


def stop_waiting(state: State, which: Tensor) -> None:
    """Lanes `which` [m] need no read-out."""
    state.lanes.waiting[which] = False


def set_drafts(state: State, which: Tensor, tokens: Tensor) -> None:
    """The newest guesses at the tokens after lanes `which` [m]."""
    lanes = state.lanes
    depth = torch.where(lanes.exited[which], lanes.exit_depth[which], lanes.depth[which])
    same = lanes.draft_token[which] == tokens
    lanes.draft_depth.index_put_((which,), torch.where(same, lanes.draft_depth[which], depth))
    lanes.draft_token.index_put_((which,), tokens)


@torch.inference_mode()
def set_cadence(state: State, rows: list[int], every: int) -> None:
    """Waves of `rows` draft after every so many recurrences."""
    state.requests.drafts[rows] = torch.arange(state.requests.drafts.shape[1], device=state.device) // every


@torch.inference_mode()
def take_settled(state: State, rows: list[int]) -> list[int]:
    """`settled` of `rows` in all, since the last call or since they were cleared. Waits for the device."""
    found = state.settled[rows].sum(0).tolist()
    state.settled.zero_()
    return found


@torch.inference_mode()
def clear_settled(state: State, row: int) -> None:
    """Another request has `row`."""
    state.settled[row] = 0


def drop(state: State, which: Tensor, wrong: Tensor | None = None) -> None:
    """Lanes `which` [...] stop, or those among them that are `wrong` [...]: their tokens are out, or they stood on a
    token that has changed."""
    lanes = state.lanes
    stays = torch.zeros_like(which, dtype=torch.bool) if wrong is None else ~wrong
    for flag in (lanes.running, lanes.uncommitted, lanes.waiting, lanes.exited):
        flag.index_put_((which,), flag[which] & stays)


def commit(state: State, rows: Tensor, lane: Tensor, tokens: Tensor, certain: Tensor) -> Tensor:
    """Put out the `tokens` [m, W] of the first lanes [m, W] of each of `rows` [m], which are `certain` [m, W].

    As `emit`, one after the other; a request that stops puts out no more. Returns whether each has stopped [m].
    """
    lanes, requests = state.lanes, state.requests
    none, row = state.config.max_num_seqs, rows[:, None].expand_as(lane)
    position = torch.where(certain, lanes.position[lane], 0)
    known = requests.known_tokens[row, position + 1] > 0
    counts = (certain & ~known).long().cumsum(1)
    ends = (requests.stops[rows][:, None] == tokens[..., None]).any(2) & ~known
    ends = ends | (requests.remaining[rows][:, None] <= counts) | (position + 1 >= state.config.max_model_len)
    ends = (ends & certain).long()
    out = certain & (ends.cumsum(1) == ends)  # none before it has ended the request
    counted, exit_depth = out & ~known, lanes.exit_depth[lane]
    requests.forced_depths.index_put_(
        (torch.where(out, row, none), torch.where(out, position, 0)), torch.where(out, exit_depth, 0).int()
    )
    place = torch.where(counted, row, none), torch.where(counted, requests.count[rows][:, None] + counts - 1, 0)
    depths = state.settled.shape[1]
    at = row * depths + lanes.draft_depth[lane].clamp(max=depths - 1)
    state.settled.view(-1).index_add_(0, at.flatten(), out.flatten().long())
    requests.tokens.index_put_(place, tokens)
    requests.depths.index_put_(place, exit_depth)
    lanes.uncommitted.index_put_((lane,), lanes.uncommitted[lane] & ~out)
    stopped, number = (ends > 0).any(1), counted.sum(1)
    requests.count.index_put_((rows,), requests.count[rows] + number)
    requests.remaining.index_put_((rows,), torch.where(stopped, 0, requests.remaining[rows] - number))
    requests.next_position.index_put_((rows,), requests.next_position[rows] + out.sum(1))
    requests.live.index_put_((rows,), requests.live[rows] & ~stopped)
    return stopped


def set_window_tokens(state: State, window: Tensor, tokens: Tensor) -> None:
    """A step of a diffusion has changed the tokens [n] that lanes `window` [n] start from."""
    lanes = state.lanes
    lanes.steps_unchanged[window] += (lanes.token[window] == tokens).long()
    lanes.token[window] = tokens


def set_window_change(state: State, window: Tensor) -> None:
    """A step of a diffusion is over: remember its states, and its change of them, for the next test of convergence."""
    lanes = state.lanes
    lanes.change[window] = lanes.s[window] - lanes.readout_state[window]
    lanes.readout_state[window] = lanes.s[window]
    lanes.exit_depth[window] = lanes.depth[window]


def restart_phase(state: State, row: int) -> None:
    """The next step of the row's diffusion begins."""
    state.requests.phase[row] = 0


def append_to_window(
    state: State, row: int, window: Tensor, position: Tensor, tokens: Tensor, s: Tensor | None
) -> None:
    """Start tokens [n] at the right end of a diffusion's window, in lanes [n] at positions [n]; they never leave of
    themselves. Their states start as s [n, D], or as the model's do (`mix_window`)."""
    lanes, zero = state.lanes, torch.zeros_like(window)
    start_lanes(state, window, zero + row, position, torch.full_like(window, NEVER), zero, tokens)
    lanes.steps_unchanged[window] = 0
    if s is not None:
        lanes.s[window] = lanes.readout_state[window] = s
    lanes.e[window], lanes.change[window] = 0.0, 0.0


def mix_window(state: State, window: Tensor, fresh: Tensor, start: Tensor, e: Tensor) -> None:
    """Lanes `window` [n] have inputs e [n, D]; those that are `fresh` [n, 1] have the states `start` [n, D]."""
    lanes = state.lanes
    lanes.s[window] = torch.where(fresh, start, lanes.s[window])
    lanes.readout_state[window] = torch.where(fresh, lanes.s[window], lanes.readout_state[window])
    lanes.e[window] = e


def set_window_states(state: State, window: Tensor, s: Tensor) -> None:
    """Lanes `window` [n] have the states s [n, D]."""
    state.lanes.s[window] = s
