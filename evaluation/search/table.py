"""The result of `loopwise search` in lines of text."""

from __future__ import annotations

from typing import Any

BEST = 12  # programs in a table


def table(result: dict[str, Any]) -> str:
    """The result of a search: the best programs, the chains of the questions, and the comparisons on other data."""
    source = result["source"]
    lines = [
        f"{result['model']}: {result['layers']} layers, {result['metric']} {_number(source)}, "
        f"{result['samples']} {result['of']}"
    ]
    if result["programs"]:
        lines += _programs(result)
    if result.get("each"):
        lines += _questions(result["each"])
    best = result["best"]
    lines.append(f"best: {best['text']}, {len(best['layers'])} layers, {result['metric']} {_number(best)}")
    for row in result["check"]:
        lines.append(
            f"on {', '.join(row['data'])}: source {_number(row['source'])}, best {_number(row['best'])}, difference "
            f"{_signed(row['over_source'], row['over_source_error'])}"
        )
    return "\n".join(lines)


def _programs(result: dict[str, Any]) -> list[str]:
    sign = -1 if result["higher"] else 1
    rows = sorted(result["programs"], key=lambda row: sign * row["value"])
    lines = [f"{'way':>10}  {'block':>7}  {'layers':>6}  {result['metric']:>8}  less the source's"]
    for row in rows[:BEST]:
        block = f"{row['first']}-{row['first'] + row['size'] - 1}"
        over = _signed(row["over_source"], row["over_source_error"])
        lines.append(f"{row['way']:>10}  {block:>7}  {len(row['layers']):>6}  {row['value']:>8.4f}  {over}")
    if left := len(rows) - BEST:
        lines.append(f"{left:>10}  more in the result file" if left > 0 else "")
    return [line for line in lines if line]


def _questions(found: dict[str, Any]) -> list[str]:
    return [
        f"chains for each question, searched with its answer known ({found['tried']} tried):",
        f"  right by the source           {_share(found['accuracy'])}",
        f"  of these, by a shorter chain  {_share(found['shorter'])}",
        f"  wrong ones that a chain mends {_share(found['mended'])}",
        f"  right by some chain           {_share(found['reachable'])}; {found['mean_layers']:.1f} layers on average",
    ]


def _share(found: dict[str, Any]) -> str:
    if found["share"] is None:
        return "none"
    error = "" if found["error"] is None else f" ± {100 * found['error']:.1f}"
    return f"{100 * found['share']:.1f}{error} % of {found['of']}"


def _number(found: dict[str, Any]) -> str:
    error = "" if found["value_error"] is None else f" ± {found['value_error']:.4f}"
    return f"{found['value']:.4f}{error}"


def _signed(value: float, error: float | None) -> str:
    return f"{value:+.4f}" + ("" if error is None else f" ± {error:.4f}")
