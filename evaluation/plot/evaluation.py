"""Results of `loopwise eval` as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint import read_json
from ...errors import UserError
from ...trained import MARK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def read(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises UserError if there is none."""
    return read_json(file.expanduser(), f"{file}: No such file or directory")


def eval_figure(file: Path) -> Figure:
    """Right answers by group and R; for a result without groups, scores or the loss by R, and by FLOPs if known.

    file: of `loopwise eval --out`. Raises UserError for any other file.
    """
    result = read(file)
    try:
        rows = result["results"]
        groups = list(rows[0].get("groups") or {})
        if groups:
            cells = [[row["groups"][name] for name in groups] for row in rows]
            names, shown = [*map(_depth, rows)], cells
            if guess := result.get("guess"):  # below the depths
                names, shown = ["guess", *names], [[guess["groups"][name] for name in groups], *cells]
            figure = _heat_map(result["group"] or "", groups, names, shown)
            if guess:
                figure.axes[0].axhline(0.5, color="white", linewidth=4)  # no depth
            figure.suptitle(_counted(result, cells), fontsize="medium")
            return figure
        return _curves(rows, str(result["model"]))
    except (KeyError, TypeError, IndexError, StopIteration):
        raise UserError(f"{file}: not a result of loopwise eval (write one with --out)") from None


def depth_figure(file: Path) -> Figure:
    """Mean recurrences and right answers by group, at the last depth of the result.

    file: of `loopwise eval endpoint=.. group=.. --out`, or with engine=lanes. Raises UserError for any other file.
    """
    result = read(file)
    from matplotlib.figure import Figure

    try:
        cells = result["results"][-1]["groups"]
        groups, name = list(cells), str(result["group"])
        depths = [float(cells[group]["mean_recurrences"]) for group in groups]
        shares = [100 * cells[group]["accuracy"] for group in groups]
    except (KeyError, TypeError, IndexError):
        raise UserError(
            f"{file}: no recurrences of groups in it (loopwise eval with endpoint or engine=lanes, group and --out)"
        ) from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(groups, depths, color="0.75")
    axes.bar_label(bars, [f"{depth:.1f}" for depth in depths])
    axes.set_ylim(0, 1.15 * max(depths))  # room for the labels
    axes.set_xlabel(name)
    axes.set_ylabel("mean recurrences")
    right = axes.twinx()
    right.plot(groups, shares, "o-", color="C3")
    right.set_ylim(0, 105)
    right.set_ylabel("right answers in %", color="C3")
    return figure


def _depth(row: dict[str, Any]) -> str:
    depth = "-" if row["num_recurrences"] is None else str(row["num_recurrences"])
    return f"{depth} {MARK}" if row.get("beyond_trained") else depth


def _counted(result: dict[str, Any], cells: list[list[dict[str, Any]]]) -> str:
    """Model and answers in two lines, with the greatest standard error of a cell, and a third line about marks."""
    counts = sorted({cell["answers"] for row in cells for cell in row})
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    error = max((cell["accuracy_error"] or 0.0 for row in cells for cell in row), default=0.0)
    sure = f", standard error up to {100 * error:.0f} %" if error else ""
    marked = any(row.get("beyond_trained") for row in result["results"])
    beyond = f"\n{MARK} deeper than trained (up to R = {result['trained_recurrences']['max']})" if marked else ""
    return f"{result['model']}\n{each} answers a cell{sure}{beyond}"


def _heat_map(group: str, groups: list[str], depths: list[str], cells: list[list[dict[str, Any]]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(1.6 + 0.55 * len(groups), 4.5), 2 + 0.4 * len(depths)), layout="constrained")
    axes = figure.subplots()
    percent = [[100 * cell["accuracy"] for cell in row] for row in cells]
    image = axes.imshow(percent, vmin=0, vmax=100, cmap="viridis", origin="lower", aspect="auto")
    for y, row in enumerate(percent):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_yticks(range(len(depths)), depths)
    axes.set_xlabel(group)
    axes.set_ylabel("recurrences")
    figure.colorbar(image, label="right answers in %")
    return figure


def _curves(rows: list[dict[str, Any]], name: str) -> Figure:
    """Scores of each task, the loss or right answers, against recurrences and FLOPs. A baseline is a level."""
    from matplotlib.figure import Figure

    value = next(name for name in ("score", "loss", "accuracy") if name in rows[0])
    names = {_what(row) for row in rows}
    beyond = sorted({row["num_recurrences"] for row in rows if row.get("beyond_trained")})
    known = all(row.get("flops_per_token") for row in rows)
    figure = Figure(figsize=(11 if known else 6, 4), layout="constrained")
    figure.suptitle(f"{name} (bars: one standard error)", fontsize="medium")
    panels = figure.subplots(1, 1 + known, squeeze=False, sharey=True)[0]
    for number, task in enumerate(dict.fromkeys(row.get("task") for row in rows)):
        of_task = [row for row in rows if row.get("task") == task]
        label = f"{task}, {_what(of_task[0])}" if len(names) > 1 else task or name
        ours = sorted((row for row in of_task if row["num_recurrences"]), key=lambda row: row["num_recurrences"])
        plain = [row for row in of_task if not row["num_recurrences"]]
        errors = [row[f"{value}_error"] or 0.0 for row in ours]
        for axes, key, scale in zip(panels, ("num_recurrences", "flops_per_token"), (1, 1e-9), strict=False):
            x, colour = [row[key] * scale for row in ours], f"C{number}"
            style = {"color": colour, "capsize": 3, "label": label}
            axes.errorbar(x, [row[value] for row in ours], errors, fmt="o-", **style)
            for row in plain:  # of the same FLOPs at any R
                axes.axhline(row[value], color=colour, linestyle="--", label=f"{task or ''} baseline".strip())
                if key == "flops_per_token":
                    axes.plot(row[key] * scale, row[value], "s", color=colour)
    panels[0].set_ylabel(names.pop() if len(names) == 1 else "score")
    if beyond:
        trained = max((row["num_recurrences"] or 0 for row in rows if not row["beyond_trained"]), default=0)
        shade_beyond(panels[0], (trained + beyond[0]) / 2, beyond[-1] + 0.3)
    panels[0].set_xlabel("recurrences")
    panels[0].set_xticks(sorted({row["num_recurrences"] for row in rows if row["num_recurrences"]}))
    if known:
        panels[1].set_xlabel("GFLOP a token")
    if rows[0].get("task") or beyond:
        panels[0].legend(frameon=False, fontsize="small")
    return figure


def shade_beyond(axes: Axes, left: float, right: float) -> None:
    """Grey behind depths that the model was not trained at. Its edge shows in a legend that stands on the grey."""
    axes.axvspan(left, right, facecolor="0.93", edgecolor="0.75", zorder=0, label="deeper than trained")


def _what(row: dict[str, Any]) -> str:
    """The label of the values: the metric's name, the loss, or right answers."""
    if "score" in row:
        return str(row["metric"]).partition(",")[0]
    return "held-out loss, nats a token" if "loss" in row else "right answers"
