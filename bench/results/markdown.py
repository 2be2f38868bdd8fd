"""Tables, error bars and claims of the page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Mean ± standard deviation over seeds; of one seed the value."""
    mean = f"{statistics.mean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, and an empty one."""
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def claim(text: str, better: Sequence[float], worse: Sequence[float], unit: str = "%", form: str = ".1f") -> str:
    """A line on whether every seed has `better` above `worse`."""
    gaps = [b - w for b, w in zip(better, worse, strict=True)]
    wins = sum(gap > 0 for gap in gaps)
    word = "holds" if wins == len(gaps) else "fails" if not wins else "is not decided"
    return f"- {text}: **{word}**, in {wins} of {len(gaps)} seeds, by {spread(gaps, form)} {unit}."


def judged(text: str, holds: Sequence[bool], found: str) -> str:
    """A line on whether a claim holds in every seed."""
    word = "holds" if all(holds) else "fails" if not any(holds) else "is not decided"
    return f"- {text}: **{word}**, in {sum(holds)} of {len(holds)} seeds ({found})."


def kept(text: str, values: Sequence[float], others: Sequence[float]) -> str:
    """A line on whether in every seed `values` lie at most one percentage point below `others`."""
    gaps = [a - b for a, b in zip(values, others, strict=True)]
    return judged(f"{text}, but for one point", [gap > -1 for gap in gaps], f"{spread(gaps)} points")


def block(reason: str, commands: Sequence[str]) -> list[str]:
    """Commands that the page's tests do not run, and an empty line."""
    return [f"<!-- not run: {reason} -->", "```sh", *commands, "```", ""]


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
