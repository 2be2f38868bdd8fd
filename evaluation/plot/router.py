"""The tokens that each recurrence of a routed model takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .observe import Depths
from .text import caption, shade

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 40  # tokens in a row of the picture


def router_figure(found: Depths, name: str) -> Figure:
    """Recurrences by tokens: a token has a square in each recurrence that it takes part in."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    starts = range(0, len(found.depths), COLUMNS)
    figure = Figure(figsize=(12, 0.6 + len(starts) * (0.25 * found.most + 0.9)), layout="constrained")
    bands = figure.subplots(len(starts), 1, squeeze=False)[:, 0]
    figure.suptitle(caption(found, name), fontsize="medium")
    for axes, start in zip(bands, starts, strict=True):
        pieces = found.tokens.pieces[start : start + COLUMNS]
        for x, depth in enumerate(found.depths[start : start + COLUMNS]):
            for r in range(1, depth + 1):
                axes.add_patch(
                    Rectangle((x - 0.5, r - 0.5), 1, 1, facecolor=shade(r, found.most)[0], edgecolor="white")
                )
        axes.set_xlim(-0.5, COLUMNS - 0.5)
        axes.set_ylim(0.5, found.most + 0.5)
        axes.set_yticks(range(1, found.most + 1))
        labels = [piece.replace("\n", "\\n").replace("$", r"\$") for piece in pieces]
        axes.set_xticks(range(len(pieces)), labels, rotation=90, fontsize="small", family="monospace")
        axes.set_ylabel("recurrence", fontsize="small")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure
