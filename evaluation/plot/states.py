"""States of a text's tokens over the recurrences: their paths, and the share by which each recurrence moves them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import UserError
from .evaluation import shade_beyond
from .observe import Tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

FOLLOWED = 6  # tokens whose paths are drawn, if none are named


def states_figure(
    tokens: Tokens, states: Tensor, chosen: list[int] | None, name: str, trained: int | None = None
) -> Figure:
    """Paths of s_r - s_R of the `chosen` positions in the plane of their first two principal components, and
    |s_r - s_(r-1)| / |s_r| of all tokens, which `latent-diff` compares with its threshold.

    states [R, T, D]. Without `chosen`, six tokens are taken, not the first: as an attention sink, its state is often a
    hundred times longer than others.   trained: the greatest R of training, beyond which paths are dotted and the
    moves stand on grey. Raises UserError for a position beyond the text, and for a single recurrence.
    """
    from matplotlib.figure import Figure

    count = len(tokens.ids)
    if chosen and (beyond := [place for place in chosen if place >= count]):
        raise UserError(f"tokens={beyond[0]}: the text has {count} tokens, 0 to {count - 1}")
    if len(states) < 2:
        raise UserError("num_recurrences=1: one recurrence has no path; give 2 or more")
    chosen = chosen or sorted({round((n + 1) * (count - 1) / FOLLOWED) for n in range(FOLLOWED)})
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(name, fontsize="medium")
    trained = min(trained or len(states), len(states))
    _paths(left, tokens, states, chosen, trained)
    _moves(right, tokens, states, chosen, trained)
    return figure


def _label(tokens: Tokens, place: int) -> str:
    return f"{place}: {tokens.pieces[place]!r}".replace("$", r"\$")  # which begins a formula


def components(states: Tensor) -> tuple[Tensor, list[float]]:
    """The first two principal components [R, n, 2] of s_r - s_R for states [R, n, D], and their shares of its square.

    All paths end in the origin: distances between tokens, which are far greater than those that a token goes, are out.
    """
    import torch

    flat = (states - states[-1]).flatten(0, 1)
    u, s, _ = torch.linalg.svd(flat, full_matrices=False)
    shares = (s**2 / (s**2).sum().clamp(min=1e-30))[:2].tolist()
    return (u[:, :2] * s[:2]).view(*states.shape[:2], -1), shares


def _paths(axes: Axes, tokens: Tokens, states: Tensor, chosen: list[int], trained: int) -> None:
    places, shares = components(states[:, chosen])
    for n, place in enumerate(chosen):
        x, y = places[:, n, 0].tolist(), places[:, n, 1].tolist()
        (line,) = axes.plot(x[:trained], y[:trained], "-", marker=".", linewidth=1, label=_label(tokens, place))
        axes.plot(x[trained - 1 :], y[trained - 1 :], ":", marker=".", linewidth=1, color=line.get_color())
        axes.plot(x[:1], y[:1], "o", markerfacecolor="white", color=line.get_color())
    axes.plot(0, 0, "s", color="0.3")
    if trained < len(states):
        axes.plot([], [], ":", color="0.3", label=f"deeper than trained (up to R={trained})")
    axes.set_xlabel(f"first principal component, {shares[0]:.0%} of the squares")
    axes.set_ylabel(f"second principal component, {shares[1]:.0%}")
    axes.set_title(f"states less the last: s_1 (circles) to s_{len(states)} (square)", fontsize="small")
    axes.legend(frameon=False, fontsize="small")


def _moves(axes: Axes, tokens: Tokens, states: Tensor, chosen: list[int], trained: int) -> None:
    moves = (states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1)  # [R - 1, T]
    recurrences = range(2, len(states) + 1)
    low, middle, high = (moves.quantile(q, dim=1).tolist() for q in (0.1, 0.5, 0.9))
    axes.fill_between(recurrences, low, high, color="0.85", label="80 % of all tokens")
    axes.plot(recurrences, middle, color="0.3", linewidth=2, label="median of all tokens")
    for place in chosen:
        axes.plot(recurrences, moves[:, place].tolist(), linewidth=1, label=_label(tokens, place))
    if trained < len(states):
        shade_beyond(axes, trained + 0.5, len(states) + 0.5)
    axes.set_yscale("log")
    axes.set_xticks(recurrences)
    axes.set_xlabel("recurrence r")
    axes.set_ylabel("|s_r - s_(r-1)| / |s_r|")
    axes.set_title("tokens below its threshold leave by latent-diff", fontsize="small")
    axes.legend(frameon=False, fontsize="small")
