"""A sweep of exit rules, or a calibration, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from .evaluation import read, shade_beyond

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MARKERS = "o^vDP*X"  # of up to seven rules, whose lines may lie on each other


def sweep_figure(file: Path) -> Figure:
    """Right answers, or the loss of a text, against mean depth: one line a rule, and fixed depths.

    file: of `loopwise eval exit_sweep=.. --out`, or calibration.json, whose losses show the chosen threshold. Raises
    UserError for any other file.
    """
    from matplotlib.figure import Figure

    result = read(file)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    try:
        chosen, top = result.get("chosen"), result["num_recurrences"]
        kind = "accuracy" if "answers" in result and not chosen else "loss"
        fixed = result["results"]  # a calibration of an earlier release has full depth alone
        _draw(axes, fixed, kind, "fixed depths" if len(fixed) > 1 else f"R={top}", "s", "0.35")
        for number, (rule, rows) in enumerate(result["exits"].items()):
            _draw(axes, rows, kind, rule, f"{MARKERS[number]}-", f"C{number}")
        if chosen:
            limit = chosen["loss"] - chosen["over_full"] + result["budget"]
            axes.axhline(limit, linewidth=1, color="0.6", label=f"budget: {result['budget']:g} above R={top}")
            label = f"chosen threshold: {chosen['threshold']:.3g}"
            if "accuracy" in chosen:
                right, full = (f"{100 * row['accuracy']:.0f} %" for row in (chosen, fixed[-1]))
                label += f", {right} of the answers right ({full} at R={top})"
            axes.plot(chosen["mean_recurrences"], chosen["loss"], "*", markersize=14, color="C3", label=label)
        _shade(axes, result)
        axes.set_title(_title(result), fontsize="medium")
    except (KeyError, TypeError, IndexError):
        raise UserError(f"{file}: not a sweep (loopwise eval with exit_sweep and --out), nor a calibration") from None
    axes.set_xlabel("mean recurrences of an answer's token" if "answers" in result else "mean recurrences of a token")
    bars = "one standard error" if kind == "accuracy" else "standard error of the distance from full depth"
    axes.set_ylabel("right answers in %" if kind == "accuracy" else "held-out loss, nats a token")
    axes.plot([], [], " ", label=f"bars: {bars}")
    axes.legend(frameon=False, fontsize="small")
    return figure


def _draw(axes: Axes, rows: list[dict[str, Any]], kind: str, label: str, marker: str, color: str) -> None:
    """A line of rows with error bars. Fixed depths get marks alone: a line would show depths that nobody measured.

    Losses vary between texts far more than between depths. So their bars are errors of the distance from full depth.
    """
    scale, error = (100, "accuracy_error") if kind == "accuracy" else (1, "over_full_error")
    depths = [row["mean_recurrences"] for row in rows]
    values = [scale * row[kind] for row in rows]
    errors = [scale * (row[error] or 0.0) for row in rows]
    axes.errorbar(depths, values, errors, fmt=marker, color=color, label=label, markersize=5, alpha=0.8, capsize=2)


def _shade(axes: Axes, result: dict[str, Any]) -> None:
    """Grey behind the mean depths beyond the trained ones, if any were measured."""
    rows = [*result["results"], *(row for rows in result["exits"].values() for row in rows)]
    if not any(row.get("beyond_trained") for row in rows):
        return
    right = axes.get_xlim()[1]
    shade_beyond(axes, result["trained_recurrences"]["max"], right)
    axes.set_xlim(right=right)


def _title(result: dict[str, Any]) -> str:
    ends = ", prompts exit, too" if result["prompt_exit"] else ""
    return f"{result['model']}, exit rules up to R={result['num_recurrences']}\nkv_policy={result['kv_policy']}{ends}"
