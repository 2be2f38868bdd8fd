"""Diffusion forcing (arXiv 2510.14961): many positions of one request are refined together, and freeze from the left.

A step embeds the current tokens, mixed with their earlier embeddings, and mixes noise into the states. It runs `inner`
recurrences on the whole window in lockstep, reads out a token for every position, and appends `headway` new positions.
Then the longest prefix of the window whose states have converged is frozen: its tokens are put out, and its keys and
values stay as they are. (The authors' code freezes up to the furthest converged position, unconverged ones among them.)
The first position of a window holds the last token that is out. Shapes: n positions of a window, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ....model.initial_state import counter_normal
from ..diffusion_settings import DiffusionSettings
from ..forward import Forward
from ..state import State
from ..transitions import windows


@dataclass
class DiffusionWindow:
    """Positions `first` to `last` (excluded) of a request are in flight. Those from `fresh` on have no state yet.
    `steps` are done."""

    settings: DiffusionSettings
    first: int
    last: int
    fresh: int
    steps: int = 0

    @property
    def size(self) -> int:
        return self.last - self.first


class Frozen(NamedTuple):
    """A window [n] of `row` after a step. committed: its lanes that are put out in order, each with its draft token.
    newest [1]: the draft token of its last position."""

    row: int
    window: Tensor
    committed: Tensor
    newest: Tensor


class Diffusion:
    """The decoder, with the windows in flight by row."""

    def __init__(self, state: State, forward: Forward):
        self.state, self.forward = state, forward
        self.settings: dict[int, DiffusionSettings] = {}
        self.windows: dict[int, DiffusionWindow] = {}

    def release(self, row: int) -> None:
        """Forget the row's request."""
        self.settings.pop(row, None)
        self.windows.pop(row, None)

    def start(self, row: int, position: int, token: Tensor) -> None:
        """The prompt is through and `token` [1] is out: a window of one position begins."""
        self.windows[row] = DiffusionWindow(self.settings[row], position, position + 1, position)
        self._append(row, position, token.view(1), None)
        self._embed([row])

    def due(self) -> list[int]:
        """Rows whose step is over."""
        phase = self.state.requests.phase
        return [row for row, window in self.windows.items() if int(phase[row]) == window.settings.inner]

    def lanes(self, rows: list[int]) -> Tensor:
        """Lanes of the windows of `rows`, in order."""
        pairs = [(row, self.windows[row]) for row in rows]
        return torch.cat([self.state.span(row, window.first, window.last) for row, window in pairs])

    def freeze(self, rows: list[int], drafts: Tensor) -> list[Frozen]:
        """The step of `rows` is over, and `drafts` [sum of n] were read out: find what is put out."""
        state, lanes, done = self.state, self.state.lanes, []
        for row, draft in zip(rows, drafts.split([self.windows[row].size for row in rows]), strict=True):
            window = self.windows[row]
            which = state.span(row, window.first, window.last)
            windows.set_drafts(state, which, draft)
            windows.set_window_tokens(state, which, torch.cat([lanes.token[which[:1]], draft[:-1]]))
            frozen = self._converged(row, window, which)
            windows.set_window_change(state, which)
            if frozen == len(which) and window.last == state.config.max_model_len:
                frozen += 1  # no position can follow that the last one would have to wait for
            # Position i is frozen with the token that position i - 1 gave.
            done.append(Frozen(row, which, which[: max(frozen - 1, 0)], draft[-1:]))
        return done

    def move_on(self, steps: list[Frozen]) -> None:
        """After the tokens of these steps are out: windows of requests that have not stopped go on, the rest end."""
        state, going = self.state, []
        for row, which, committed, newest in steps:
            window = self.windows[row]
            settings = window.settings
            if not bool(state.requests.live[row]):
                windows.drop(state, which)
                del self.windows[row]
                continue
            room = settings.window(state.config.max_in_flight) - len(which)
            more = max(min(settings.headway, room, state.config.max_model_len - window.last), 0)
            continues = settings.continuous and len(which) >= settings.headway
            if more:
                s = state.lanes.s[which[-settings.headway :]][:more] if continues else None
                self._append(row, window.last, newest.expand(more), s)
            windows.drop(state, committed)
            window.first += len(committed)
            going.append(row)
            window.fresh = window.last + (more if continues else 0)
            window.last += more
            window.steps += 1
            windows.restart_phase(state, row)
        if going:
            self._embed(going)

    def _converged(self, row: int, window: DiffusionWindow, which: Tensor) -> int:
        """How many lanes `which` [n] have converged, from the left. The last of these stays, to give the next token."""
        state, lanes, settings = self.state, self.state.lanes, window.settings
        limit = state.requests.num_recurrences[row]
        steps = int(limit) // settings.inner
        if settings.freeze == "fixed":
            return min(settings.headway + 1, len(which)) if window.steps > steps else 0
        if settings.freeze == "token-stability":
            converged = lanes.steps_unchanged[which] > steps
        else:
            change = (lanes.s[which] - lanes.readout_state[which]).float()
            if settings.freeze == "acceleration":
                change = change - lanes.change[which].float()
            converged = change.norm(dim=-1) / lanes.s[which].float().norm(dim=-1) < settings.threshold
        converged = converged | (lanes.depth[which] >= limit)
        return int(converged.long().cumprod(0).sum())

    def _append(self, row: int, first: int, tokens: Tensor, s: Tensor | None) -> None:
        """Start tokens [n] at positions `first` and after, with states s [n, D] or the model's own."""
        which = self.state.span(row, first, first + len(tokens))
        position = torch.arange(first, first + len(tokens), device=which.device)
        windows.append_to_window(self.state, row, which, position, tokens, s)

    def _embed(self, rows: list[int]) -> None:
        """Embed the windows of `rows` anew, and mix in the earlier embeddings and noise.

        The earlier embedding of a new position is zero, as in the authors' code, except in a window's very first.
        """
        lanes, moving = self.state.lanes, [self.windows[row] for row in rows]
        which = self.lanes(rows)
        position = lanes.position[which]
        e = self.forward.prelude(lanes.token[which], lanes.row[which], position)

        def each(values: list[float]) -> Tensor:
            sizes = torch.tensor([window.size for window in moving])
            return torch.tensor(values).repeat_interleave(sizes)[:, None].to(e.device)

        fresh = position[:, None] >= each([float(window.fresh) for window in moving])
        ema = each([window.settings.ema for window in moving])
        opening = each([float(window.steps == 0) for window in moving]) > 0
        old = torch.where(opening, e, lanes.e[which])
        mixed = ((1 - ema) * e + ema * old).to(e.dtype)
        windows.mix_window(self.state, which, fresh, self.forward.initial_state(e, position), mixed)
        if any(window.settings.noise for window in moving):
            share = each([window.settings.noise for window in moving]) / (1 + lanes.depth[which][:, None])
            steps = torch.cat([torch.full((window.size,), window.steps) for window in moving]).to(which.device)
            seeds = torch.cat([torch.full((window.size,), window.settings.seed) for window in moving]).to(which.device)
            noise = counter_normal(0, seeds * (1 << 20) + steps, position[:, None], e.shape[-1])[:, 0]
            noisy = lanes.s[which] * (1 - share) + share * noise * self.forward.parts.config.state_std
            windows.set_window_states(self.state, which, noisy.to(e.dtype))
