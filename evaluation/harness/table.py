"""Scores by recurrences as a Markdown table: a column for each depth, and one for the baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...trained import MARK, mark_line

COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "mean_recurrences": ("recurrences/token", lambda value: f"{value:.2f}"),
    "flops_per_token": ("GFLOP/token", lambda value: f"{value / 1e9:.4g}"),
    "seconds_per_token": ("ms/token", lambda value: f"{value * 1e3:.3g}"),
}


def markdown(result: dict[str, Any]) -> str:
    """The result of `evaluate_tasks`: scores with standard errors, then costs, then a line about marked depths."""
    rows = result["results"]
    columns = sorted({(not row["baseline"], row["num_recurrences"] or 0) for row in rows})
    beyond = {row["num_recurrences"] for row in rows if row["beyond_trained"]}
    by_task: dict[str, dict[tuple[bool, int], dict[str, Any]]] = {}
    for row in rows:
        column = (not row["baseline"], row["num_recurrences"] or 0)
        by_task.setdefault(row["task"], {})[column] = row
    head = ["task", "", "questions", *(_title(column, beyond) for column in columns)]
    lines = []
    for task, found in by_task.items():
        first = next(iter(found.values()))
        cells = [_score(found.get(column)) for column in columns]
        lines.append([task, metric_name(first["metric"]), f"{first['samples']:,}", *cells])
    for key, (name, form) in COSTS.items():
        costs = {
            task: ["" if (value := found.get(column, {}).get(key)) is None else form(value) for column in columns]
            for task, found in by_task.items()
        }
        costs = {task: cells for task, cells in costs.items() if any(cells)}
        if len(costs) > 1 and len(set(map(tuple, costs.values()))) == 1:
            costs = {"all": next(iter(costs.values()))}
        lines += [[task, name, "", *cells] for task, cells in costs.items()]
    notes = []
    if beyond and result["trained_recurrences"]:
        notes = ["", mark_line(result["trained_recurrences"])]
    return "\n".join([f"{_heading(result)}", "", *_aligned([head, *lines]), *notes])


def metric_name(key: str) -> str:
    """lm-eval's `metric,filter` in words."""
    metric, _, kind = key.partition(",")
    return metric if kind in ("", "none") else f"{metric} ({kind})"


def score_text(row: dict[str, Any]) -> str:
    """The score of a row with its standard error."""
    error = "" if row["score_error"] is None else f" ± {row['score_error']:.3f}"
    return f"{row['score']:.3f}{error}"


def _score(row: dict[str, Any] | None) -> str:
    return "" if row is None else score_text(row)


def _heading(result: dict[str, Any]) -> str:
    settings = result["settings"]
    place = f" at {settings['endpoint']}" if settings["endpoint"] else f", engine {settings['engine']}"
    return f"{result['model']}{place}: scores of tasks by recurrences"


def _title(column: tuple[bool, int], beyond: set[int]) -> str:
    recurrent, depth = column
    if not recurrent:
        return "baseline"
    return "model" if not depth else f"R={depth}" + f" {MARK}" * (depth in beyond)


def _aligned(rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table, whose first row is its head; the first two columns are text."""
    widths = [max(3, *(len(row[n]) for row in rows)) for n in range(len(rows[0]))]
    sides = ["<", "<", *(">" for _ in widths[2:])]
    lines = [
        "| " + " | ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|".join(
        f" {'-' * width} " if side == "<" else f" {'-' * (width - 1)}: "
        for side, width in zip(sides, widths, strict=True)
    )
    return [lines[0], f"|{rule}|", *lines[1:]]
