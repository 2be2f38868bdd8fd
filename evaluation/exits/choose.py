"""The threshold of the smallest mean depth whose loss stays within a budget of full depth's."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...errors import UserError
from .bench import Bench

GRID = 7  # thresholds, evenly spread
HALVINGS = 3  # of the interval between the best one and the next that saves more


class Choice(NamedTuple):
    """Rows of `Bench`: at full depth, the chosen one, and all that were measured, by their mean depth."""

    full: dict[str, Any]
    chosen: dict[str, Any]
    curve: list[dict[str, Any]]


def choose(bench: Bench, rule: str, budget: float) -> Choice:
    """The threshold of `rule` that spends the fewest recurrences within `budget`.

    budget: nats a token that the loss may lie above full depth's. Raises UserError where no threshold that saves
    recurrences stays within it.
    """
    top = bench.decoding.num_recurrences
    full = bench.fixed(top)
    saved = bench.saved(rule)
    measured: dict[float, dict[str, Any]] = {}  # by threshold
    shares: dict[float, dict[str, Any]] = {}  # by the share that the threshold was to save

    def measure(share: float) -> dict[str, Any] | None:
        threshold = saved.threshold(share)
        if threshold is None:
            return None
        if threshold not in measured:
            measured[threshold] = bench.at(rule, threshold)
        shares[share] = measured[threshold]
        return shares[share]

    def fits(row: dict[str, Any]) -> bool:
        return row["over_full"] <= budget and row["mean_recurrences"] < full["mean_recurrences"]

    for i in range(1, GRID + 1):
        measure(i / (GRID + 1))
    for _ in range(HALVINGS):
        good = max((share for share, row in shares.items() if fits(row)), default=0.0)
        above = min((share for share in shares if share > good), default=1.0)
        measure((good + above) / 2)
    curve = sorted(measured.values(), key=lambda row: row["mean_recurrences"])
    chosen = next(filter(fits, curve), None)
    if chosen is None:
        raise UserError(_none_fits(rule, budget, top, full, curve))
    return Choice(full, chosen, curve)


def _none_fits(rule: str, budget: float, top: int, full: dict[str, Any], curve: list[dict[str, Any]]) -> str:
    saving = [row for row in curve if row["mean_recurrences"] < full["mean_recurrences"]]
    nearest = min(saving, key=lambda row: (row["over_full"], -row["mean_recurrences"]), default=None)
    found = "" if nearest is None else (
        f"; the nearest, {nearest['threshold']:.3g} at {nearest['mean_recurrences']:.2f} recurrences, is "
        f"{nearest['over_full']:.4f} above"
    )  # fmt: skip
    return (
        f"rule={rule}: no threshold stays within budget={budget:g} nats a token of the loss {full['loss']:.4f} at "
        f"R={top}{found}; choose a greater budget, or another rule"
    )
