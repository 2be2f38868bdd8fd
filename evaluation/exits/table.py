"""A sweep of exit rules, or a calibration, as a table."""

from __future__ import annotations

from typing import Any

from ...trained import MARK, mark_line

BUDGET = 0.01  # nats a token above full depth that the last line of a sweep allows


def sweep_table(result: dict[str, Any]) -> str:
    """The result of `loopwise eval exit_sweep=..`: one line for each fixed depth and each threshold."""
    has_answers, top = "answers" in result, result["num_recurrences"]
    counted = f"{result['answers']:,} answers, " if has_answers else ""
    lines = [f"{result['model']}: {result['parameters']:,} parameters, {counted}{result['tokens']:,} tokens"]
    lines.append(f"decoded up to R={top} under {_conditions(result)}")
    lines.append(f"{'':<16} {_head(top, has_answers)}")
    for name, rows in {"fixed": result["results"], **result["exits"]}.items():
        for row in rows:
            lines.append(f"{name:<16} {_line(row)}")
    lines += marked(result, [*result["results"], *(row for rows in result["exits"].values() for row in rows)])
    found = {name: _spent(row) for name, row in least_depths(result, BUDGET).items()}
    least = ", ".join(f"{name} {spent}" for name, spent in found.items())
    lines.append(f"fewest recurrences within {BUDGET} nats a token of R={top}: {least}")
    if has_answers:
        found = {name: _spent(row) for name, row in least_depths_of_answers(result).items()}
        least = ", ".join(f"{name} {spent}" for name, spent in found.items())
        lines.append(f"fewest recurrences with right answers within one standard error of R={top}: {least}")
    return "\n".join(lines)


def marked(result: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """The line about the mark, where a row has it. Results of earlier releases have none."""
    return [mark_line(result["trained_recurrences"])] if any(row.get("beyond_trained") for row in rows) else []


def mark(row: dict[str, Any]) -> str:
    """The mark of a row beyond the trained depths, or a space."""
    return MARK if row.get("beyond_trained") else " "


def least_depths(result: dict[str, Any], budget: float) -> dict[str, dict[str, Any]]:
    """By rule, and "fixed": the row of the smallest mean depth whose loss is at most `budget` above full depth's."""
    found = {}
    for name, rows in {"fixed": result["results"], **result["exits"]}.items():
        within = [row for row in rows if row["over_full"] <= budget]
        if within:
            found[name] = min(within, key=lambda row: row["mean_recurrences"])
    return found


def least_depths_of_answers(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By rule, and "fixed": the row of the smallest mean depth whose right answers are at most a standard error below
    full depth's. A loss may hold where answers do not: few answers that are surely wrong weigh as many that are right.
    """
    full = next(row for row in result["results"] if row["num_recurrences"] == result["num_recurrences"])
    floor = full["accuracy"] - (full["accuracy_error"] or 0.0)
    found = {}
    for name, rows in {"fixed": result["results"], **result["exits"]}.items():
        within = [row for row in rows if row["accuracy"] >= floor]
        if within:
            found[name] = min(within, key=lambda row: row["mean_recurrences"])
    return found


def calibration_table(found: dict[str, Any]) -> str:
    """The result of `exits.calibration`: the curve, the choice, and its check."""
    top, rule, check = found["num_recurrences"], found["rule"], found["check"]
    lines = [f"{rule}, loss within {found['budget']:g} nats a token of R={top}, decoded under {_conditions(found)}"]
    lines.append(f"one half of the data, {found['tokens']:,} tokens:")
    lines.append(_head(top, "accuracy" in found["chosen"]))
    lines += [_line(row) + ("  chosen" if row == found["chosen"] else "") for row in found["exits"][rule]]
    lines += ["fixed depths:", *map(_line, found["results"])]
    lines.append(f"the other half, {found['check_tokens']:,} tokens, which had no part in the choice:")
    lines += [_line(check["chosen"]), _line(check["full"])]
    lines += marked(found, [*found["exits"][rule], *found["results"], *check.values()])
    if (found["chosen"]["over_full_error"] or 0) > found["budget"]:
        lines.append("note: the standard error of the choice is above the budget; more data makes it surer")
    if (over := check["chosen"]["over_full"]) > found["budget"]:
        lines.append(f"warning: on the other half the loss is {over:.4f} above full depth's, over the budget")
    fixed = least_depths(found, found["budget"]).get("fixed")
    if fixed and fixed["mean_recurrences"] <= (spent := found["chosen"]["mean_recurrences"]):
        lines.append(
            f"note: num_recurrences={fixed['num_recurrences']} stays within the budget without a rule, at no more "
            f"recurrences than the chosen {spent:.2f}"
        )
    if max(row["over_full"] for row in (found["chosen"], check["chosen"])) < 0:
        lines.append(
            f"note: R={top} has a greater loss on both halves: look for a smaller num_recurrences first (loopwise eval)"
        )
    answers, of_full = (check[name].get("accuracy", 0.0) for name in ("chosen", "full"))
    if of_full - answers > 2 * (check["full"].get("accuracy_error") or 0.0):
        lines.append(
            f"warning: on the other half {100 * answers:.1f} % of the answers are right, and {100 * of_full:.1f} % at "
            "full depth: the budget of the loss does not hold them"
        )
    return "\n".join(lines)


def _conditions(result: dict[str, Any]) -> str:
    exits = ", prompt_exit" if result["prompt_exit"] else ""
    least = result["min_recurrences"]
    return f"kv_policy={result['kv_policy']}{exits}" + (f", min_recurrences={least}" if least > 1 else "")


def _head(top: int, has_answers: bool) -> str:
    right = f" {'right in %':>11}" if has_answers else ""
    return f"{'threshold':>9} {'recurrences':>12} {'loss':>9} {'±':>7} {f'above R={top}':>17}{right}"


def _line(row: dict[str, Any]) -> str:
    threshold = f"{row['threshold']:.3g}" if "threshold" in row else "-"
    error = "-" if row["loss_error"] is None else f"{row['loss_error']:.4f}"
    above = f"{row['over_full']:.4f}"
    if row["over_full_error"] is not None:
        above += f" ± {row['over_full_error']:.4f}"
    right = f" {100 * row['accuracy']:>11.1f}" if "accuracy" in row else ""
    depth = f"{row['mean_recurrences']:>12.2f}{mark(row)}"
    return f"{threshold:>9} {depth}{row['loss']:>9.4f} {error:>7} {above:>17}{right}"


def _spent(row: dict[str, Any]) -> str:
    at = f" (at {row['threshold']:.3g})" if "threshold" in row else ""
    return f"{row['mean_recurrences']:.2f}{at}"
