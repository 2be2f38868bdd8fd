"""Warnings about numbers of recurrences that a model was never trained at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def trained_at(trained: dict[str, Any]) -> str:
    """`trained_recurrences` of a config in words, as "1 to 32 recurrences (mean 8)"."""
    low, high, mean = trained["min"], trained["max"], trained["mean"]
    return f"{high} recurrences" if low == high else f"{low} to {high} recurrences (mean {mean:g})"


def beyond_trained(trained: dict[str, Any] | None, depths: Iterable[int]) -> str | None:
    """A warning in one line where some of `depths` are beyond the greatest that the model was trained at, else None.

    trained: `trained_recurrences` of its config; nothing is said where that is None.
    """
    beyond = sorted({depth for depth in depths if trained and depth > trained["max"]})
    if trained is None or not beyond:
        return None
    asked = ", ".join(map(str, beyond))
    return f"warning: num_recurrences={asked}: this model was trained at {trained_at(trained)}, and not beyond"
