"""A text whose tokens have the colours of their depths: a page of HTML that stands alone, and a picture."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import TYPE_CHECKING

from .observe import Depths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 88  # characters in a line of the picture
STYLE = """
body { font: 16px/1.9 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; color: #111;
  background: #fff }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.text span, .legend span { border-radius: 3px; padding: 1px 0; box-shadow: inset -1px 0 #fff8 }
.legend span { padding: 1px 8px; margin-right: 4px; white-space: nowrap }
"""


def shade(depth: int, most: int) -> tuple[str, str]:
    """(background, text) colours of `depth` on a scale from 1 to `most`, which colour-blind readers can tell apart."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    red, green, blue, _ = colormaps["cividis"](1 - (depth - 1) / max(most - 1, 1))
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.4
    return to_hex((red, green, blue)), "#000000" if light else "#ffffff"


def text_page(found: Depths, name: str) -> str:
    """The page of a text. name: the model's. A token's title has its depth, for those who do not see its colour."""
    spans = []
    for piece, depth in zip(found.tokens.pieces, found.depths, strict=True):
        if piece:
            back, front = shade(depth, found.most)
            spans.append(
                f'<span style="background:{back};color:{front}" title="{depth} of {found.most}">{escape(piece)}</span>'
            )
    counts = Counter(found.depths)
    legend = []
    for depth in range(1, found.most + 1):
        back, front = shade(depth, found.most)
        share = counts[depth] / len(found.depths)
        legend.append(f'<span style="background:{back};color:{front}">{depth}: {share:.0%}</span>')
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Depth of tokens: {escape(name)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>Depth of tokens</h1>\n<p>{escape(caption(found, name))}</p>\n"
        f'<p class="legend">{" ".join(legend)}</p>\n<div class="text">{"".join(spans)}</div>\n</html>\n'
    )


def caption(found: Depths, name: str) -> str:
    """Model, rule and mean depth in a sentence."""
    mean = sum(found.depths) / len(found.depths)
    return f"{name}, {found.rule}: {mean:.2f} of {found.most} recurrences a token, {len(found.depths)} tokens"


def text_figure(found: Depths, name: str) -> Figure:
    """The same as a picture, in lines of `COLUMNS` characters."""
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    lines = _lines(found)
    height = 0.24 * len(lines)
    figure = Figure(figsize=(10, height + 1.3), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(len(lines), 0)
    axes.set_axis_off()
    axes.set_title(caption(found, name), fontsize="medium", loc="left")
    for y, line in enumerate(lines):
        for x, piece, depth in line:
            back, front = shade(depth, found.most)
            axes.add_patch(Rectangle((x, y + 0.04), len(piece) - 0.06, 0.92, color=back, linewidth=0))
            for n, letter in enumerate(piece):
                axes.text(
                    x + n + 0.5, y + 0.5, letter, family="monospace", fontsize=9, ha="center", va="center", color=front,
                    parse_math=False,
                )  # fmt: skip
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(
        ScalarMappable(Normalize(1, max(found.most, 2)), "cividis_r"), ax=axes, orientation="horizontal", aspect=60,
        shrink=0.6, label="recurrences",
    )  # fmt: skip
    bar.set_ticks(range(1, found.most + 1))
    return figure


def _lines(found: Depths) -> list[list[tuple[int, str, int]]]:
    """Lines of (column, text, depth), cut at line breaks and at `COLUMNS`."""
    lines: list[list[tuple[int, str, int]]] = [[]]
    column = 0
    for piece, depth in zip(found.tokens.pieces, found.depths, strict=True):
        for number, part in enumerate(piece.replace("\t", "    ").split("\n")):
            if number:
                lines.append([])
                column = 0
            while part:
                if column == COLUMNS or (column + len(part) > COLUMNS >= len(part)):
                    lines.append([])
                    column = 0
                taken, part = part[: COLUMNS - column], part[COLUMNS - column :]
                lines[-1].append((column, taken, depth))
                column += len(taken)
    return lines
