"""Results of `loopwise eval` as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint import read_json
from ...errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def read(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises UserError if there is none."""
    return read_json(file.expanduser(), f"{file}: No such file or directory")


def eval_figure(file: Path) -> Figure:
    """Right answers by group and R, or the loss by R for a result without groups.

    file: of `loopwise eval --out`. Raises UserError for any other file.
    """
    result = read(file)
    try:
        rows = result["results"]
        groups = list(rows[0].get("groups") or {})
        if groups:
            shares = [[row["groups"][name]["accuracy"] for name in groups] for row in rows]
            return _heat_map(result["group"] or "", groups, [_depth(row) for row in rows], shares)
        return _loss([_depth(row) for row in rows], [row["loss"] for row in rows], [row["loss_error"] for row in rows])
    except (KeyError, TypeError, IndexError):
        raise UserError(f"{file}: not a result of loopwise eval (write one with --out)") from None


def depth_figure(file: Path) -> Figure:
    """Mean recurrences and right answers by group, at the last depth of the result.

    file: of `loopwise eval endpoint=.. group=.. --out`. Raises UserError for any other file.
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
            f"{file}: no recurrences of groups in it (loopwise eval with endpoint, group and --out)"
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
    return "-" if row["num_recurrences"] is None else str(row["num_recurrences"])


def _heat_map(group: str, groups: list[str], depths: list[str], shares: list[list[float]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 0.55 * len(groups), 1.6 + 0.4 * len(depths)), layout="constrained")
    axes = figure.subplots()
    percent = [[100 * share for share in row] for row in shares]
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


def _loss(depths: list[str], losses: list[float], errors: list[float | None]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(depths, losses, [error or 0.0 for error in errors], fmt="o-", color="C3", capsize=3)
    axes.set_xlabel("recurrences")
    axes.set_ylabel("held-out loss")
    return figure
