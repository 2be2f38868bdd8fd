"""Training speed between two log lines."""

from __future__ import annotations

import time


class Speed:
    """Wall-clock time of the steps since the last log line, without evaluations."""

    def __init__(self) -> None:
        self._since: tuple[int, int, float] | None = None  # step, tokens of the run and time of the last log line

    def start(self, step: int, tokens: int) -> None:
        """Start the clock before `step`, with `tokens` of the run so far, unless it runs already."""
        self._since = self._since or (step, tokens, time.perf_counter())

    def skip(self, seconds: float) -> None:
        """Leave `seconds` that have just passed out of the time."""
        if self._since:
            self._since = (*self._since[:2], self._since[2] + seconds)

    def lap(self, step: int, tokens: int) -> tuple[range, int, float] | None:
        """(steps since the last lap, their tokens, their seconds), and begin a new lap at `step`. None before `start`.

        tokens: of the run so far.
        """
        if self._since is None:
            return None
        before, counted, at = self._since
        now = time.perf_counter()
        self._since = (step, tokens, now)
        return range(before, step), tokens - counted, now - at
