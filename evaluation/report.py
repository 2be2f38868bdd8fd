"""The result of `loopwise eval` as a table."""

from __future__ import annotations

from typing import Any

from ..diagnosis import state_lines
from .exits.table import mark, marked, sweep_table


def table(result: dict[str, Any]) -> str:
    """The result of `evaluate`, one line per depth."""
    if "endpoint" in result or "engine" in result:
        return _replies_table(result)
    if "exits" in result:
        return sweep_table(result)
    has_answers = "answers" in result
    counted = (
        f"{result['answers']:,} answers, {result['tokens']:,} tokens"
        if has_answers
        else f"{result['tokens']:,} held-out tokens"
    )
    lines = [f"{result['model']}: {result['parameters']:,} parameters, {counted}"]
    groups = list(result["results"][0]["groups"]) if has_answers else []
    if groups:
        lines.append(f"right answers in %, by {result['group']}")
    head = f"{'recurrences':>11}  {'loss':>8}  {'perplexity':>10}"
    width = max(5, *map(len, groups)) if groups else 5
    lines.append(head + ("  " + " ".join(f"{name:>{width}}" for name in [*groups, "all"]) if has_answers else ""))
    if guess := result.get("guess"):
        shares = " ".join(f"{100 * share:>{width}.1f}" for share in _shares(guess, groups))
        lines.append(f"{'guess':>11}  {'':>8}  {'':>10}  {shares}")
    for row in result["results"]:
        depth = "-" if row["num_recurrences"] is None else row["num_recurrences"]
        line = f"{depth:>11}{mark(row)} {row['loss']:>8.4f}  {row['perplexity']:>10.2f}"
        if has_answers:
            line += "  " + " ".join(f"{100 * share:>{width}.1f}" for share in _shares(row, groups))
        lines.append(line)
    lines += marked(result, result["results"])
    return "\n".join(lines + (_loop_lines(result["loop"]) if result["loop"] else []))


def _shares(row: dict[str, Any], groups: list[str]) -> list[float]:
    """Right answers of each group, and of all."""
    return [*(row["groups"][name]["accuracy"] for name in groups), row["accuracy"]]


def _loop_lines(loop: dict[str, Any]) -> list[str]:
    top, lines = loop["num_recurrences"], []
    if loop["gain"] is not None:
        error = "" if loop["gain_error"] is None else f" ± {loop['gain_error']:.4f}"
        lines.append(f"loss at R=1 less that at R={top}: {loop['gain']:.4f}{error}")
    return lines + state_lines(loop["state_norm"], loop["state_change"]) + loop["diagnosis"]


def _replies_table(result: dict[str, Any]) -> str:
    groups = list(result["results"][0]["groups"])
    width = max(6, *map(len, groups)) if groups else 6
    names = " ".join(f"{name:>{width}}" for name in [*groups, "all"])
    by = f", by {result['group']}" if groups else ""
    who = (
        f"{result['served']} at {result['endpoint']}, with the tokenizer of {result['model']}"
        if "endpoint" in result
        else f"{result['model']} in the lane engine, kv_policy={result['kv_policy']}"
    )
    lines = [
        f"{who}: {result['answers']:,} answers",
        f"{'':>11}  right answers in %{by}, and the recurrences per token",
        f"{'recurrences':>11}  {names}  {names}  {'tokens/s':>8}",
    ]
    if guess := result.get("guess"):
        lines.append(f"{'guess':>11}  " + " ".join(f"{100 * share:>{width}.1f}" for share in _shares(guess, groups)))
    for row in result["results"]:
        cells = [*(row["groups"][name] for name in groups), row]
        right = " ".join(f"{100 * share:>{width}.1f}" for share in _shares(row, groups))
        spent = [cell["mean_recurrences"] for cell in cells]
        depths = " ".join(f"{'-' if depth is None else f'{depth:.2f}':>{width}}" for depth in spent)
        depth = row["num_recurrences"] or "-"
        lines.append(f"{depth:>11}{mark(row)} {right}  {depths}  {row['tokens_per_second']:>8,.0f}")
    return "\n".join(lines + marked(result, result["results"]))
