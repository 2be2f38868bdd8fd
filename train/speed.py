"""Training speed between two log lines."""

from __future__ import annotations

import time


class Speed:
    """Wall-clock time of the steps since the last log line, without evaluations."""

    def __init__(self) -> None:
        self._since: tuple[int, float] | None = None  # step and time of the last log line

    def start(self, step: int) -> None:
        """Start the clock before `step`, unless it runs already."""
        self._since = self._since or (step, time.perf_counter())

    def skip(self, seconds: float) -> None:
        """Leave `seconds` that have just passed out of the time."""
        if self._since:
            self._since = (self._since[0], self._since[1] + seconds)

    def lap(self, step: int) -> tuple[range, float] | None:
        """(steps since the last lap, their seconds), and begin a new lap at `step`. None before `start`."""
        if self._since is None:
            return None
        before, at = self._since
        now = time.perf_counter()
        self._since = (step, now)
        return range(before, step), now - at
