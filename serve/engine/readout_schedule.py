"""The time of a read-out: exits and drafts may wait some passes for others that are read out with them."""

from __future__ import annotations

from collections.abc import Callable

from .costs import Costs


class ReadoutSchedule:
    """Decides when exits are read out. An exit waits at most `coda_wait` passes; with `costs`, as many as the load
    makes worth while. Both kinds of tick ask it after every pass."""

    def __init__(self, coda_wait: int, max_lanes: int):
        self.coda_wait, self.max_lanes = coda_wait, max_lanes
        self.costs: Costs | None = None
        self.waited = 0  # passes that an exit has waited
        self.every, self.since = 1, 0  # passes between drafts of waves, and passes since the last
        self.passes = 0  # that have run
        self.load = [0.0, 0.0, 0.0]  # passes, lanes in them, exits; older steps count half as much each

    def begin_step(self, every: int) -> None:
        """Set `coda_wait` for this step by the load of the steps before. Waves draft after `every` passes."""
        self.every = every
        passes, lanes, exits = self.load
        if self.costs and exits:
            self.coda_wait = self.costs.patience(lanes / passes, exits / passes, lanes / exits)
        self.load = [part / 2 for part in self.load]

    def note(self, passes: int, lanes: int, exits: int, prompts: bool = False) -> None:
        """So many passes ran, with `lanes` in all, and lanes left. Passes with `prompts` are no measure of the load."""
        self.passes += passes
        if not prompts:
            self.load = [a + b for a, b in zip(self.load, (passes, lanes, exits), strict=True)]

    def due(
        self,
        pending: bool,
        running: int,
        *,
        forced: bool = False,
        more_within: Callable[[int], bool] = lambda passes: True,
    ) -> bool:
        """After a pass: exits are read out now. Counts the pass as waited, if exits are `pending`.

        running: lanes of the next pass without those that wait; a full pass leaves them time at no cost.
        forced: nothing else can go on.   more_within: another lane may leave within so many passes.
        """
        self.waited += pending
        full = bool(self.costs and self.max_lanes) and running >= self.max_lanes
        left = self.coda_wait - self.waited + 1
        due = self.waited > 0 and (forced or not (full or (left > 0 and more_within(left))))
        if due:
            self.reset()
        return due

    def drafts_due(self, forced: bool = False) -> bool:
        """Drafts that wait are read out now. Those of all waves wait for the same passes, one in `every`."""
        due = forced or self.since >= self.every
        self.since = 0 if due else self.since
        return due

    def reset(self) -> None:
        """No exit waits."""
        self.waited = 0
