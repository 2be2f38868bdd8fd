"""Pictures with error bars over seeds; heat maps and the like are `loopwise plot`'s."""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .commands import Failed

Points = Sequence[tuple[float, float]]


def drawn(what: str, source: Path, to: Path) -> None:
    """`loopwise plot WHAT SOURCE --out TO`."""
    from loopwise.cli import main

    with contextlib.redirect_stdout(io.StringIO()):
        if main(["plot", what, str(source), "--out", str(to)]):
            raise Failed(f"loopwise plot {what} {source}: no picture")


def bar(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def accuracy(arms: Mapping[str, Any], levels: Mapping[str, Any], to: Path) -> None:
    """Right answers of all groups against R, and against the FLOPs of a token's forward pass.

    arms: results of each seed, measured at several R.   levels: likewise, of plain models.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_depth, by_flops = figure.subplots(1, 2, sharey=True)
    for number, (name, results) in enumerate(arms.items()):
        rows = list(zip(*(result["results"] for result in results), strict=True))
        each = [[100 * row["accuracy"] for row in of_depth] for of_depth in rows]
        style = {"fmt": "o-", "capsize": 3, "color": f"C{number}", "label": name}
        means, bars = [statistics.mean(values) for values in each], [bar(values) for values in each]
        by_depth.errorbar([of_depth[0]["num_recurrences"] for of_depth in rows], means, bars, **style)
        by_flops.errorbar([of_depth[0]["flops_per_token"] * 1e-6 for of_depth in rows], means, bars, **style)
    for number, (name, results) in enumerate(levels.items(), len(arms)):
        values = [100 * result["results"][0]["accuracy"] for result in results]
        flops = results[0]["results"][0]["flops_per_token"] * 1e-6
        by_depth.axhline(statistics.mean(values), linestyle="--", color=f"C{number}", label=name)
        by_flops.errorbar(
            [flops], [statistics.mean(values)], [bar(values)], fmt="s", capsize=3, color=f"C{number}", label=name
        )
    by_depth.set(xlabel="recurrences", ylabel="right answers in %, 0 to 16 hops", xscale="log", ylim=(0, 100))
    by_depth.set_xticks(rows_ticks(arms), [str(tick) for tick in rows_ticks(arms)])
    by_depth.minorticks_off()
    by_flops.set(xlabel="MFLOP a token (forward pass)", xscale="log")
    by_depth.legend(
        frameon=False, fontsize="small", title="bars: standard deviation over seeds", title_fontsize="small"
    )
    figure.savefig(to, dpi=110)


def rows_ticks(arms: Mapping[str, Any]) -> list[int]:
    return sorted({row["num_recurrences"] for results in arms.values() for row in results[0]["results"]})


def curves(lines: Mapping[str, Points], level: tuple[str, float], to: Path) -> None:
    """Held-out loss against training FLOPs: one line for each run, and the source's level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(lines.items()):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", markersize=3, color=f"C{number}", label=name)
    axes.axhline(level[1], color="0.4", linestyle="--", label=level[0])
    axes.set(xlabel="training FLOPs, the teacher's included", ylabel="held-out loss, nats a token")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(to, dpi=110)
