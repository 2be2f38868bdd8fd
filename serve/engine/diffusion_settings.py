"""Settings of the decoder `diffusion`."""

from __future__ import annotations

from dataclasses import dataclass

from ...deprecated import SERVING, accept_old_names

FREEZES = ("latent-diff", "acceleration", "token-stability", "fixed")


@accept_old_names(SERVING)
@dataclass(frozen=True)
class DiffusionSettings:
    """Settings of the decoder `diffusion` for one request (diffusion forcing, arXiv 2510.14961).

    inner: recurrences of a step (r').   headway: positions that a step appends.   ema: weight of the earlier
    embeddings. noise: weight of the noise mixed into the states, divided by one plus a position's recurrences. freeze:
    the test of convergence: |s - s'| / |s| below `threshold` (latent-diff), the same for the change of s - s'
    (acceleration), or a token unchanged for more than R / `inner` steps (token-stability). R recurrences are enough in
    any case. `fixed` freezes `headway` positions a step, once there were more than R / `inner` steps. continuous: new
    positions start from the state of the last ones. max_in_flight: most positions in flight; 0 for as many as the
    engine allows.
    """

    inner: int = 4
    headway: int = 1
    ema: float = 0.1
    noise: float = 0.0
    freeze: str = "latent-diff"
    threshold: float = 0.03
    continuous: bool = False
    seed: int = 0
    max_in_flight: int = 0

    def mistake(self) -> str | None:
        """An error message for the first value out of range; None without one."""
        if self.freeze not in FREEZES:
            return f"freeze={self.freeze[:60]!r}: choose from {', '.join(FREEZES)}"
        for name in ("inner", "headway"):
            if getattr(self, name) < 1:
                return f"{name}={getattr(self, name)}: at least 1"
        for name in ("ema", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                return f"{name}={getattr(self, name)}: a share, from 0 to 1"
        if not self.threshold >= 0:
            return f"threshold={self.threshold}: at least 0"
        return None

    def ahead(self, passes: int, max_in_flight: int) -> int:
        """Positions that `passes` may reach beyond the first of a window of at most `max_in_flight`."""
        window = self.window(max_in_flight)
        return window + min(self.headway, window) * (passes // self.inner + 1)

    def window(self, max_in_flight: int) -> int:
        """Positions in flight in an engine that allows `max_in_flight`."""
        return min(self.max_in_flight or max_in_flight, max_in_flight)
