"""Passes that are padded, and passes that only warm up, leave nothing behind."""

from __future__ import annotations

from ..state import State


def clear_spare_count(state: State) -> None:
    """Forget the tokens of the spare row, which puts one out for every padding lane of a read-out."""
    state.requests.count[-1:].zero_()


def clear_flags(state: State) -> None:
    """No lane runs or waits: after a warm-up."""
    lanes = state.lanes
    for flag in (lanes.running, lanes.wants_token, lanes.uncommitted, lanes.waiting, lanes.exited):
        flag.zero_()
