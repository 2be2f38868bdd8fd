"""The protocol of a model in the engine's pieces, over rows of any requests, positions and depths.

Shapes: N rows of a call, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...model.configuration_recurrent_depth import RecurrentDepthConfig
from ...model.damping import Damping
from ...model.ends import Ends
from ...model.injection import Injection
from ...model.router import Router


class Parts(Protocol):
    """A recurrent-depth model in pieces. Its layers attend by an Attention, planned for the same rows beforehand."""

    config: RecurrentDepthConfig
    injection: Injection
    ends: Ends
    damping: Damping
    router: Router | None
    needs_tokens: bool  # layers embed the tokens of their rows
    tokens: Tensor  # [N], where they do: those of the next call's rows; Forward sets them

    @property
    def compilable(self) -> bool:
        """A recurrence, the embedding and the head are one graph each (see compile.py)."""
        ...

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The first layer's input [N, D] for tokens [N] at positions [N]."""
        ...

    def layers(
        self, part: str, x: Tensor, positions: Tensor, depths: Tensor | None = None, limits: Tensor | None = None
    ) -> Tensor:
        """x [N, D] through the layers of "prelude", "core" or "coda".

        `depths` select the core's LoRA: [N], or [1] for all rows. Its time conditioning is of these and of R, `limits`
        [N].
        """
        ...

    def norm_between(self, s: Tensor) -> Tensor:
        """The source's final norm of s [N, D]."""
        ...

    def norm_each(self, s: Tensor) -> Tensor:
        """The recurrence norm of s [N, D]."""
        ...

    def logits(self, x: Tensor) -> Tensor:
        """Final norm, head and the source's changes of logits: [N, D] -> [N, V]."""
        ...

    def gate(self, s: Tensor) -> Tensor:
        """Exit gate's logits [N] for states [N, D]."""
        ...
