"""Marks and warnings of numbers of recurrences that a model was never trained at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MARK = "†"  # of a depth beyond the trained ones, in tables and pictures


def trained_at(trained: dict[str, Any]) -> str:
    """`trained_recurrences` of a config in words, as "1 to 32 recurrences (mean 8)"."""
    low, high, mean = trained["min"], trained["max"], trained["mean"]
    return f"{high} recurrences" if low == high else f"{low} to {high} recurrences (mean {mean:g})"


def is_beyond(trained: dict[str, Any] | None, depth: float | None) -> bool:
    """True for a (mean) depth beyond the greatest that a model was trained at; False where either is unknown."""
    return bool(trained and depth and depth > trained["max"])


def mark_line(trained: dict[str, Any]) -> str:
    """The line below a table that tells its readers what the mark is."""
    return f"{MARK} beyond the {trained_at(trained)} that the model was trained at"


def beyond_trained(trained: dict[str, Any] | None, depths: Iterable[int]) -> str | None:
    """A warning in one line where some of `depths` are beyond the greatest that the model was trained at, else None.

    trained: `trained_recurrences` of its config; nothing is said where that is None.
    """
    beyond = sorted({depth for depth in depths if trained and depth > trained["max"]})
    if trained is None or not beyond:
        return None
    asked = ", ".join(map(str, beyond))
    return f"warning: num_recurrences={asked}: this model was trained at {trained_at(trained)}, and not beyond"
