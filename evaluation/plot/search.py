"""A search for layers to skip and repeat, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from .evaluation import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def search_figure(file: Path) -> Figure:
    """The blocks of a scan by way, first layer and size; or the layers of the shortest right chains of questions.

    file: of `loopwise search --out`. Raises UserError for any other file.
    """
    result = read(file)
    try:
        if result["programs"]:
            return _blocks(result)
        if result["questions"]:
            return _questions(result)
        if result["tried"]:
            return _tried(result)
    except (KeyError, TypeError, IndexError):
        pass
    raise UserError(f"{file}: not a result of loopwise search (write one with --out)")


def _blocks(result: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    rows = result["programs"]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    sizes = sorted({row["size"] for row in rows})
    figure = Figure(figsize=(7, 2.2 * len(ways) + 0.6), layout="constrained")
    panels = figure.subplots(len(ways), 1, sharex=True, squeeze=False)[:, 0]
    for axes, way in zip(panels, ways, strict=True):
        for number, size in enumerate(sizes):
            mine = sorted((row for row in rows if (row["way"], row["size"]) == (way, size)), key=lambda r: r["first"])
            middle = [row["first"] + (size - 1) / 2 for row in mine]
            axes.plot(middle, [row["value"] for row in mine], "o-", markersize=3, color=f"C{number}", label=str(size))
        _source(axes, result)
        axes.set_title(way, fontsize="medium")
        axes.set_ylabel(_label(result))
        best = sorted(row["value"] for row in rows if row["way"] == way)
        low, high = best[0], best[3 * len(best) // 4]  # a few blocks at the ends would press all others flat
        near = min(low, result["source"]["value"]), max(high, result["source"]["value"])
        if not result["higher"]:
            room = 0.1 * (near[1] - near[0]) or 0.1
            axes.set_ylim(near[0] - room, near[1] + room)
    panels[-1].set_xlabel("middle of the block, a layer counted from 0")
    panels[0].legend(title="layers", frameon=False, fontsize="small", ncols=len(sizes) + 1)
    figure.suptitle(Path(str(result["model"])).name, fontsize="medium")
    return figure


def _source(axes: Axes, result: dict[str, Any]) -> None:
    axes.axhline(result["source"]["value"], color="0.4", linestyle="--", linewidth=1, label="source")


def _label(result: dict[str, Any]) -> str:
    names = {"loss": "loss, nats a token", "accuracy": "right answers"}
    return names.get(result["metric"], str(result["metric"]))


def _questions(result: dict[str, Any]) -> Figure:
    """Histogram of the layers of the shortest right chain, by whether the source is right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    groups = {"right by the source": True, "wrong by the source": False}
    lengths = [
        [len(row["shortest"]) for row in result["questions"] if row["right"] == right and row["shortest"]]
        for right in groups.values()
    ]
    most = max(map(max, filter(None, lengths)), default=result["layers"])
    least = min(map(min, filter(None, lengths)), default=0)
    bins = [edge - 0.5 for edge in range(least, most + 2)]
    axes.hist(lengths, bins=bins, stacked=True, label=[*groups], color=["C0", "C1"])
    axes.axvline(result["layers"], color="0.4", linestyle="--", linewidth=1, label="layers of the source")
    none = sum(row["shortest"] is None for row in result["questions"])
    axes.set_title(f"{len(result['questions'])} questions, {none} without a right chain", fontsize="medium")
    axes.set_xlabel("layers of the shortest right chain")
    axes.set_ylabel("questions")
    axes.legend(frameon=False, fontsize="small")
    return figure


def _tried(result: dict[str, Any]) -> Figure:
    """Value against length of the chains that were tried for all questions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([len(row["chain"]) for row in result["tried"]], [row["value"] for row in result["tried"]], "o", alpha=0.5)
    axes.plot(result["layers"], result["source"]["value"], "s", color="C3", label="source")
    axes.set_xlabel("layers of the chain")
    axes.set_ylabel(_label(result))
    axes.legend(frameon=False)
    return figure
