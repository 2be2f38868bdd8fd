"""Diffusion forcing (arXiv 2510.14961): many positions of one request are refined together, and freeze from the left.

A step of it embeds the current tokens (mixed with what was embedded before), mixes noise into the states, runs
`inner` recurrences on the whole wave in lockstep, reads out a token for every position, and appends `headway` new ones.
Then the longest prefix of the wave whose states have converged is frozen: its tokens are out, and its keys and values
stay as they are. (The authors' code freezes up to the furthest converged position, leaving unconverged ones behind.)
The first position of a wave holds the last token that is out. Shapes: n positions of a wave, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...model.initial_state import counter_normal
from .parts import start

if TYPE_CHECKING:
    from .loop import Loop

NEVER = 1 << 40  # recurrences after which a lane leaves that does not leave of itself
FREEZES = ("latent-diff", "acceleration", "token-stability", "fixed")


@dataclass(frozen=True)
class Diffusion:
    """How a request is refined. `inner`: recurrences of a step (r'); `headway`: positions appended by a step; `ema`:
    share of the earlier embeddings; `noise`: of noise in the states, divided by one plus a position's recurrences.

    `freeze` tells when a position has converged: |s - s'| / |s| below `threshold` (latent-diff), the same of the change
    of s - s' (acceleration), or a token unchanged for more than R / `inner` steps (token-stability); R recurrences are
    enough in any case. `fixed` freezes `headway` positions a step once there were more than R / `inner` steps.
    `continuous`: new positions start from the state of the last ones. `wave`: most positions in flight, 0 for as many
    as the engine was made for.
    """

    inner: int = 4
    headway: int = 1
    ema: float = 0.1
    noise: float = 0.0
    freeze: str = "latent-diff"
    threshold: float = 0.03
    continuous: bool = False
    seed: int = 0
    wave: int = 0

    def mistake(self) -> str | None:
        """What is wrong with these values; None if nothing is."""
        if self.freeze not in FREEZES:
            return f"freeze={self.freeze!r}: choose from {', '.join(FREEZES)}"
        for name in ("inner", "headway"):
            if getattr(self, name) < 1:
                return f"{name}={getattr(self, name)}: at least 1"
        for name in ("ema", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                return f"{name}={getattr(self, name)}: a share, from 0 to 1"
        if not self.threshold >= 0:
            return f"threshold={self.threshold}: at least 0"
        return None

    def ahead(self, ticks: int, wave: int) -> int:
        """Positions that `ticks` passes may reach beyond the first of a wave of at most `wave`."""
        wave = self.most(wave)
        return wave + min(self.headway, wave) * (ticks // self.inner + 1)

    def most(self, wave: int) -> int:
        """Positions in flight in an engine that was made for `wave`."""
        return min(self.wave or wave, wave)


@dataclass
class Wave:
    """A request's wave: positions `first` to `last` (excluded) are in flight, those from `fresh` on without a state as
    yet; `steps` are done."""

    of: Diffusion
    first: int
    last: int
    fresh: int
    steps: int = 0


def begin(loop: Loop, row: int, position: int, token: torch.Tensor) -> None:
    """The prompt is through and `token` [1] is out: a wave of one position begins."""
    request = loop.diffusions[row]
    loop.waves[row] = Wave(request, position, position + 1, position)
    _append(loop, row, position, token.view(1), None)
    _embed(loop, [row])


def refine(loop: Loop, rows: list[int], tokens: torch.Tensor) -> None:
    """The step of `rows` is over, and `tokens` [sum of n] are what was read out of their waves: freeze, put out, append
    and embed anew."""
    lanes, requests = loop.lanes, loop.requests
    going = []
    for row, guess in zip(rows, tokens.split([_size(loop.waves[row]) for row in rows]), strict=True):
        wave = loop.waves[row]
        own = lanes.span(row, wave.first, wave.last)
        lanes.guess[own] = guess
        current = torch.cat([lanes.token[own[:1]], guess[:-1]])
        lanes.stable[own] += (lanes.token[own] == current).long()
        lanes.token[own] = current
        frozen = _frozen(loop, row, wave, own)
        delta = lanes.s[own] - lanes.read[own]
        lanes.change[own], lanes.read[own] = delta, lanes.s[own]
        lanes.left[own] = lanes.depth[own]
        last = guess[-1:]
        if frozen == len(own) and wave.last == requests.length:
            frozen += 1  # nothing can be appended that the last one would have to wait for
        for lane in own[: max(frozen - 1, 0)]:  # position i is frozen with the token that position i - 1 gave
            loop.emit(lane[None])
            if not bool(requests.live[row]):
                break
        if not bool(requests.live[row]):
            lanes.running[own] = lanes.open[own] = False
            del loop.waves[row]
            continue
        more = max(min(wave.of.headway, wave.of.most(loop.wave) - len(own), requests.length - wave.last), 0)
        continues = wave.of.continuous and len(own) >= wave.of.headway
        if more:
            states = lanes.s[own[-wave.of.headway :]][:more] if continues else None
            _append(loop, row, wave.last, last.expand(more), states)
        lanes.running[own[: max(frozen - 1, 0)]] = lanes.open[own[: max(frozen - 1, 0)]] = False
        wave.first += max(frozen - 1, 0)
        going.append(row)
        wave.fresh = wave.last + (more if continues else 0)
        wave.last += more
        wave.steps += 1
        requests.phase[row] = 0
    if going:
        _embed(loop, going)


def _size(wave: Wave) -> int:
    return wave.last - wave.first


def _frozen(loop: Loop, row: int, wave: Wave, own: torch.Tensor) -> int:
    """How many positions from the left have converged; the last of them stays in the wave, to give the next token."""
    lanes, of = loop.lanes, wave.of
    steps = int(loop.requests.limit[row]) // of.inner
    if of.freeze == "fixed":
        return min(of.headway + 1, len(own)) if wave.steps > steps else 0
    if of.freeze == "token-stability":
        converged = lanes.stable[own] > steps
    else:
        change = (lanes.s[own] - lanes.read[own]).float()
        if of.freeze == "acceleration":
            change = change - lanes.change[own].float()
        converged = change.norm(dim=-1) / lanes.s[own].float().norm(dim=-1) < of.threshold
    converged = converged | (lanes.depth[own] >= loop.requests.limit[row])
    return int(converged.long().cumprod(0).sum())


def _append(loop: Loop, row: int, first: int, tokens: torch.Tensor, states: torch.Tensor | None) -> None:
    """New positions at the right, with tokens [n]; their states start as `states` [n, D], or as the model's do."""
    lanes = loop.lanes
    own = lanes.span(row, first, first + len(tokens))
    position = torch.arange(first, first + len(tokens), device=own.device)
    zero = torch.zeros_like(own)
    lanes.begin(own, zero + row, position, torch.full_like(own, NEVER), zero, tokens)
    lanes.stable[own] = 0
    if states is not None:
        lanes.s[own] = lanes.read[own] = states
    lanes.e[own], lanes.change[own] = 0.0, 0.0


def _embed(loop: Loop, rows: list[int]) -> None:
    """Embed the waves of `rows` anew, mixing in what was embedded before; in new positions that is zero, as in the
    authors' code, except in a wave's very first."""
    lanes = loop.lanes
    waves = [loop.waves[row] for row in rows]
    own = torch.cat([lanes.span(row, wave.first, wave.last) for row, wave in zip(rows, waves, strict=True)])
    position = lanes.position[own]
    e = loop.prelude(lanes.token[own], lanes.row[own], position)

    def each(values: list[float]) -> torch.Tensor:
        sizes = torch.tensor([_size(wave) for wave in waves])
        return torch.tensor(values).repeat_interleave(sizes)[:, None].to(e.device)

    fresh = position[:, None] >= each([float(wave.fresh) for wave in waves])
    lanes.s[own] = torch.where(fresh, start(loop.parts, e, position), lanes.s[own])
    lanes.read[own] = torch.where(fresh, lanes.s[own], lanes.read[own])
    ema = each([wave.of.ema for wave in waves])
    opening = each([float(wave.steps == 0) for wave in waves]) > 0
    old = torch.where(opening, e, lanes.e[own])
    lanes.e[own] = ((1 - ema) * e + ema * old).to(e.dtype)
    if any(wave.of.noise for wave in waves):
        share = each([wave.of.noise for wave in waves]) / (1 + lanes.depth[own][:, None])
        steps = torch.cat([torch.full((_size(wave),), wave.steps) for wave in waves]).to(own.device)
        seeds = torch.cat([torch.full((_size(wave),), wave.of.seed) for wave in waves]).to(own.device)
        noise = counter_normal(0, seeds * (1 << 20) + steps, position[:, None], e.shape[-1])[:, 0]
        mixed = lanes.s[own] * (1 - share) + share * noise * loop.parts.config.state_std
        lanes.s[own] = mixed.to(e.dtype)
