"""A text whose tokens have the colours of their depths: a page of HTML that stands alone, and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING

from .observe import Depths

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS, NARROWEST = 88, 64  # characters in a line of the picture, at most and at least
CELL, LINE = 0.11, 0.26  # inches: the width of a character, and the height of a line
CAPTION = 1.6  # letters of the caption in the width of a character of the text
STYLE = """
body { font: 16px/1.9 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; color: #111;
  background: #fff }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.text span, .legend span { border-radius: 3px; padding: 1px 0; box-shadow: inset -1px 0 #fff8 }
.note { color: #555 }
.legend span { padding: 1px 8px; margin-right: 4px; white-space: nowrap }
"""


def shade(depth: int, most: int) -> tuple[str, str]:
    """(background, text) colours of `depth` on a scale from 1 to `most`, which colour-blind readers can tell apart."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    red, green, blue, _ = colormaps["cividis"](1 - (depth - 1) / max(most - 1, 1))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]  # relative luminance of WCAG 2.2
    black, white = (luminance + 0.05) / 0.05, 1.05 / (luminance + 0.05)  # contrasts
    return to_hex((red, green, blue)), "#000000" if black > white else "#ffffff"


def text_page(found: Depths, name: str) -> str:
    """The page of a text. name: the model's. A token's title has its depth, for those who do not see its colour."""
    spans = []
    for piece, depth in _parts(found):
        if depth is None:
            spans.append(escape(piece))
            continue
        back, front = shade(depth, found.most)
        spans.append(
            f'<span style="background:{back};color:{front}" title="{depth} of {found.most}">{escape(piece)}</span>'
        )
    legend = []
    for text, depth in _legend(found):
        back, front = shade(depth, found.most)
        legend.append(f'<span style="background:{back};color:{front}">{text}</span>')
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Depth of tokens: {escape(name)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>Depth of tokens</h1>\n<p>{escape(caption(found, name))}</p>\n"
        f'<p class="note">{note(found)}</p>\n<p class="legend">recurrences {" ".join(legend)}</p>\n'
        f'<div class="text">{"".join(spans)}</div>\n</html>\n'
    )


def caption(found: Depths, name: str) -> str:
    """Model, rule and mean depth in a sentence."""
    mean = sum(found.depths) / len(found.depths)
    return f"{name}, {found.rule}: {mean:.2f} of {found.most} recurrences a token, {len(found.depths)} tokens"


def note(found: Depths) -> str:
    """The meaning of a colour: a reader may take it for the recurrences that wrote the token."""
    text = "Colour: recurrences that a token ran to predict the next one."
    return text if found.routed else f"{text} The first token, a prompt, ran all {found.most}."


def text_figure(found: Depths, name: str) -> Figure:
    """The same as a picture, in lines of `COLUMNS` characters."""
    from matplotlib.figure import Figure

    lines = _lines(_parts(found), COLUMNS)
    columns = max(NARROWEST, *(line[-1][0] + len(line[-1][1]) for line in lines if line))
    above = [line for text in (caption(found, name), note(found)) for line in wrap(text, int(CAPTION * columns))]
    legend = _lines(_spaced(_legend(found)), columns)
    rows = len(above) + len(legend) + 0.5 + len(lines)
    figure = Figure(figsize=((columns + 2) * CELL, (rows + 0.6) * LINE))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-1, columns + 1)
    axes.set_ylim(rows + 0.3, -0.3)
    axes.set_axis_off()
    for y, text in enumerate(above):
        axes.text(0, y + 0.5, text, fontsize=9.5, va="center", parse_math=False)
    for first, block in ((len(above), legend), (len(above) + len(legend) + 0.5, lines)):
        for y, line in enumerate(block):
            for x, piece, depth in line:
                _draw(axes, x, first + y, piece, depth, found.most)
    return figure


def _draw(axes: Axes, x: float, y: float, piece: str, depth: int | None, most: int) -> None:
    """A piece of text, in the colour of its depth if it has one."""
    from matplotlib.patches import Rectangle

    back, front = ("none", "#555555") if depth is None else shade(depth, most)
    axes.add_patch(Rectangle((x, y + 0.04), len(piece) - 0.06, 0.92, color=back, linewidth=0))
    for n, letter in enumerate(piece):
        axes.text(
            x + n + 0.47, y + 0.5, letter, family="monospace", fontsize=12, ha="center", va="center", color=front,
            parse_math=False,
        )  # fmt: skip


def _parts(found: Depths) -> Iterator[tuple[str, int | None]]:
    """All of the text in order, in pieces with the depths of their tokens; None where no token stands for a piece."""
    *before, end = found.tokens.gaps
    for gap, piece, depth in zip(before, found.tokens.pieces, found.depths, strict=True):
        if gap:
            yield gap, None
        if piece:
            yield piece, depth
    if end:
        yield end, None


def _legend(found: Depths) -> list[tuple[str, int]]:
    """Every depth with its share of the tokens."""
    counts = Counter(found.depths)
    return [(f"{depth}: {counts[depth] / len(found.depths):.0%}", depth) for depth in range(1, found.most + 1)]


def _spaced(legend: list[tuple[str, int]]) -> Iterator[tuple[str, int | None]]:
    yield "recurrences ", None
    for text, depth in legend:
        yield f" {text} ", depth
        yield " ", None


def _lines(parts: Iterable[tuple[str, int | None]], columns: int) -> list[list[tuple[int, str, int | None]]]:
    """Lines of (column, text, depth), cut at line breaks and at `columns`."""
    lines: list[list[tuple[int, str, int | None]]] = [[]]
    column = 0
    for piece, depth in parts:
        for number, part in enumerate(piece.replace("\t", "    ").split("\n")):
            if number:
                lines.append([])
                column = 0
            while part:
                if column == columns or (column + len(part) > columns >= len(part)):
                    lines.append([])
                    column = 0
                taken, part = part[: columns - column], part[columns - column :]
                lines[-1].append((column, taken, depth))
                column += len(taken)
    return lines
