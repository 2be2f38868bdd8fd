"""The cadence of drafts: which waves draft when, and K, the recurrences between drafts, where it is left to the engine.

Let t be the depth from which a position's draft is its token. The next position's last start is K ceil(t / K) passes
behind, at most R. So a wave of w positions takes the mean of that, or R / w, passes a token, whichever is more. Of
these, one in K is followed by a read-out. K is the one at which all requests together gain the most tokens a second, by
the measured costs of passes and read-outs at so many lanes; at K = R a wave is plain decoding. Only K = 1 shows every
t, so a coarser cadence is left for that now and then.
"""

from __future__ import annotations

from ..costs import Costs
from ..readout_schedule import ReadoutSchedule
from ..request import Request
from ..state import State
from ..tick import Workload
from ..transitions import windows

FEWEST, MOST = 16, 256  # positions by which K is chosen; beyond, old ones count half
BETTER = 1.1  # gain for which K changes
PROBE, PAUSE = 3, 45  # times R: passes with K = 1, whose first third is not counted, and passes between


class Cadence:
    """Keeps `Workload.waves`. `schedule` counts passes."""

    def __init__(self, state: State, work: Workload, schedule: ReadoutSchedule):
        self.state, self.work, self.schedule = state, work, schedule
        self.every, self.best = 1, 1  # K now, and the K to which it returns after a probe
        self.rows: dict[int, int] = {}  # with this K, and their R
        self.settled = [0.0] * (state.policy.depths + 1)  # positions of `rows` by t, older ones count less
        self.passes, self.before = 0, schedule.passes  # since the probe began; of `schedule`, before this step

    def admit(self, row: int, request: Request) -> None:
        """A request has come to `row`."""
        if request.max_in_flight == 1:
            return
        if not request.draft_every and not request.draft_depths:
            self.rows[row] = request.num_recurrences
            windows.set_cadence(self.state, [row], self.every)
            windows.clear_settled(self.state, row)
        first = min(request.draft_depths, default=request.draft_every or self.every)
        self.work.waves[row] = first, request.max_in_flight

    def release(self, row: int) -> None:
        """The row's request is gone."""
        self.work.waves.pop(row, None)
        self.rows.pop(row, None)

    def begin_step(self) -> int:
        """Set K for this step. Returns the passes after which all waves draft."""
        self.passes += (self.schedule.passes - self.before) * bool(self.rows)
        self.before = self.schedule.passes
        if self.rows:
            every = self._next()
            if every != self.every:
                self.every = every
                windows.set_cadence(self.state, list(self.rows), every)
                self.work.waves.update({row: (every, self.work.waves[row][1]) for row in self.rows})
        return min(self.work.waves.values(), default=(1, 0))[0]

    def _next(self) -> int:
        """K of the next step. Waits for the device."""
        depth, found = max(self.rows.values()), windows.take_settled(self.state, list(self.rows))
        if self.every == 1 and self.passes > depth:
            share = 0.5 if sum(self.settled) > MOST else 1.0
            self.settled = [old * share + new for old, new in zip(self.settled, found, strict=True)]
        if self.every > 1 and self.passes > (PROBE + PAUSE) * depth:
            self.passes = 0
            return 1
        if self.passes < PROBE * depth or sum(self.settled) < FEWEST:
            return self.every
        widths = [self.work.waves[row][1] for row in self.rows]
        plain = max(self.work.resident - len(widths), 0)
        rates = {
            every: rate(every, depth, self.settled, max(widths), len(widths), plain, self.work.costs, self._budget)
            for every in range(1, depth + 1)
        }
        best = max(rates, key=lambda every: rates[every])
        self.best = best if rates[best] > BETTER * rates.get(self.best, 0) else self.best
        return self.best

    @property
    def _budget(self) -> int:
        return self.state.config.max_lanes or self.work.budget


def rate(
    every: int, depth: int, settled: list[float], width: int, waves: int, plain: int, costs: Costs | None, budget: int
) -> float:
    """Tokens in the time of `costs` (None: a pass and a read-out take 1 each), of `waves` waves of `width` and `plain`
    other requests, all of `depth` recurrences, with a draft after `every` recurrences.

    settled: positions by the depth from which their draft is right.   budget: lanes that waves may fill; 0: no bound.
    """
    share = 1 + max(budget - plain - waves, 0) // max(waves, 1) if budget else width
    width = max(1, min(width, share, -(-depth // every)))
    ahead = sum(count * min(every * -(-t // every), depth) for t, count in enumerate(settled)) / sum(settled)
    passes = max(ahead, depth / width)
    lanes = waves * width
    a, c = (costs.of_pass(plain + lanes), costs.of_read(lanes)) if costs else (1.0, 1.0)
    return (waves / passes + plain / depth) / (a + c / every)
