"""A router sets the depths of lanes [m] (see routing.py)."""

from __future__ import annotations

from torch import Tensor

from ..state import State


def set_exit(state: State, where: Tensor, exit_at: Tensor | int) -> None:
    """Lanes `where` [m] leave after `exit_at` [m] recurrences."""
    state.lanes.exit_at[where] = exit_at


def set_exit_depth(state: State, where: Tensor, depth: Tensor | int) -> None:
    """Lanes `where` [m] count as left after `depth` [m] recurrences."""
    state.lanes.exit_depth[where] = depth


def exit_at_once(state: State, where: Tensor) -> None:
    """Lanes `where` [m] leave before their first recurrence."""
    lanes = state.lanes
    lanes.exit_depth[where] = 0
    lanes.running[where], lanes.exited[where], lanes.waiting[where] = False, True, True
