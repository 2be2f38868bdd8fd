"""What the engine asks of a model, over N rows (lanes) of any requests, positions and depths."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ...model.initial_state import initial_state
from ...model.injection import Injection


class Parts(Protocol):
    """A recurrent-depth model in pieces. `attend` stands behind: an Attention, planned for the same rows beforehand.

    `config` is its RecurrentDepthConfig.
    """

    config: Any
    injection: Injection
    router: Any  # a model.router.Router, or None

    @property
    def compilable(self) -> bool:
        """Whether a recurrence, the embedding and the head are a graph each (see compiled.py)."""
        ...

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """tokens, positions [N] -> [N, D]."""
        ...

    def layers(self, part: str, x: torch.Tensor, positions: torch.Tensor, depths: torch.Tensor | None) -> torch.Tensor:
        """x [N, D] through the layers of prelude, core or coda; `depths` are those of the core's relaxation: [N], or
        [1] of all rows."""
        ...

    def norm_between(self, s: torch.Tensor) -> torch.Tensor:
        """The source's final norm."""
        ...

    def norm_each(self, s: torch.Tensor) -> torch.Tensor:
        """The recurrence norm of its own."""
        ...

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Final norm, head and what the source does to logits: [N, D] -> [N, V]."""
        ...

    def gate(self, s: torch.Tensor) -> torch.Tensor:
        """Exit gate's logits [N] of states [N, D]."""
        ...


def start(parts: Parts, e: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """s_0 [N, D]. One sequence id for all requests, as transformers has by default: noise then depends on the position
    alone."""
    return initial_state(parts.config, e[None], positions[None], None)[0]


def recur(
    parts: Parts,
    s: torch.Tensor,
    e: torch.Tensor,
    positions: torch.Tensor,
    begun: torch.Tensor,
    depth: torch.Tensor,
) -> torch.Tensor:
    """One recurrence of rows: s, e [N, D] -> s [N, D]. `begun` [N]: whether they have had any; `depth` [N]: which one
    it is, counted from 0; [1]: of all."""
    norm = parts.config.recurrence_norm
    if norm == "between":
        s = torch.where(begun[:, None], parts.norm_between(s), s)
    s = parts.layers("core", parts.injection(s, e), positions, depth)
    return parts.norm_each(s) if norm == "each" else s


def recur_alike(parts: Parts, *inputs: torch.Tensor) -> torch.Tensor:
    """`recur` of rows that are all at one depth, with the same inputs."""
    s, e, positions, begun, depth = inputs
    return recur(parts, s, e, positions, begun, depth[:1])


def embed(parts: Parts, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What the first layer gets [N, D] of tokens at positions [N]."""
    return parts.embed(tokens, positions)


def logits(parts: Parts, x: torch.Tensor) -> torch.Tensor:
    """What the head says [N, V] of what it reads [N, D]."""
    return parts.logits(x)


def head(parts: Parts, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, and the likeliest tokens [N]."""
    said = parts.logits(x)
    wide = said.float() if said.element_size() < 4 else said  # several times faster on a CPU than bfloat16's own
    return said, wide.argmax(-1)


def read_out(parts: Parts, s: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What the head reads [N, D] of states [N, D]."""
    if parts.config.recurrence_norm == "last":
        s = parts.norm_between(s)
    return parts.layers("coda", s, positions, None)
