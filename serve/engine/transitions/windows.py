"""The decoders wave and diffusion move their windows.

Shapes: m lanes, n positions of a diffusion's window, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..request import NEVER
from ..state import State
from .steps import start_lanes


def set_drafts(state: State, which: Tensor, tokens: Tensor) -> None:
    """The newest guesses at the tokens after lanes `which` [m]."""
    state.lanes.draft_token[which] = tokens


def drop(state: State, which: Tensor) -> None:
    """Lanes `which` [m] stop: their tokens are out, or they stood on a token that has changed."""
    lanes = state.lanes
    lanes.running[which] = lanes.uncommitted[which] = lanes.exited[which] = False


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
