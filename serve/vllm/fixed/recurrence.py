"""prelude -> s_0 -> R x (inject, core) -> coda over vLLM's own decoder layers, at a depth fixed at start-up.

vLLM's source model keeps its list of layers, one for each set of weights, and runs it as usual. Each listed layer
returns its input, and the last one runs the whole recurrence. The recurrence runs *copies* of the layers: they share
the weights, and have an `Attention`, so a KV cache, for every depth. Shapes: N tokens of the step, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ....model import RecurrentDepthConfig
from ....model.damping import Damping
from ....model.ends import Ends
from ....model.initial_state import initial_state
from ....model.injection import Injection
from ....model.recurrence_norm import norm_after, norm_at_end, norm_before
from ..layers import convention_of, fold, layer_copy

LayerCall = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class Between(NamedTuple):
    """The modules between two recurrences, and at both ends, children of another module. norm: the one that
    `recurrence_norm` names."""

    injection: Injection
    ends: Ends
    damping: Damping
    norm: Callable[[torch.Tensor], torch.Tensor] | None


class Recurrence(nn.Module):
    """Runs in place of the last of `layers`: the unique layers in the order prelude, core, coda.

    `forward` takes the arguments that vLLM's source model passes to a layer, and returns the same values.
    """

    def __init__(
        self,
        config: RecurrentDepthConfig,
        num_recurrences: int,
        layers: list[nn.Module],
        between: Between,
        context: dict[str, Any],
    ):
        """`context`: vLLM's static forward context, which gets an Attention for every depth of the core."""
        super().__init__()
        self.config = config
        self.between = between  # a tuple: nothing in it becomes a child of this module, too
        self.convention = convention_of(layers[0])
        first, last = len(config.prelude), len(config.prelude) + len(config.core)

        def copies(start: int, stop: int, shift: int = 0) -> nn.ModuleList:
            return nn.ModuleList(layer_copy(layers[i], i, i + shift, context) for i in range(start, stop))

        # Depth 0 has the attention of the listed layers; the others are numbered on from the last layer of the list.
        shifts = [0] + [len(layers) - first + depth * len(config.core) for depth in range(num_recurrences - 1)]
        self.prelude = copies(0, first)
        self.core = nn.ModuleList(copies(first, last, shift) for shift in shifts)
        self.coda = copies(last, len(layers))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.convention == "fused":
            return self._fused(*args, **kwargs)
        return self._plain(*args, **kwargs) if self.convention == "plain" else self._transformers(*args, **kwargs)

    def _fused(self, positions, hidden_states, residual=None, **kwargs):
        """The final norm of vLLM's models reads both x and residual."""
        x, residual = self.run(hidden_states, positions, lambda layer, x, r: layer(positions, x, r, **kwargs))
        return x, torch.zeros_like(x) if residual is None else residual

    def _plain(self, positions, hidden_states, **kwargs):
        return self.run(hidden_states, positions, lambda layer, x, _: (layer(positions, x, **kwargs), None))[0]

    def _transformers(self, hidden_states, *args, **kwargs):
        positions = kwargs["position_ids"]
        return self.run(hidden_states, positions, lambda layer, x, _: (layer(x, *args, **kwargs), None))[0]

    def run(
        self, x: torch.Tensor, positions: torch.Tensor, call: LayerCall
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The embedded tokens x [N, D] or [1, N, D] -> (x, residual) after the coda.

        `call(layer, x, residual) -> (x, residual)`. The pair is folded where the state itself is needed. vLLM's norms
        also write into the residual that they get. That never changes e, or the state that damping reads again: what
        goes into the core is a new tensor then.
        """
        residual = None
        for layer in self.prelude:
            x, residual = call(layer, x, residual)
        e = self.between.ends.enter(fold(x, residual))
        x, residual = self._initial_state(e, positions), None
        core: Any = self.core
        kind, (injection, ends, damping, norm) = self.config.recurrence_norm, self.between
        damped = damping.kind != 1
        if self.config.sharing == "sequence":
            for n in range(len(self.config.core)):
                for layers in core:
                    x, residual = call(layers[n], x, residual)
        else:
            for depth, layers in enumerate(core):
                s = norm_before(kind, fold(x, residual), norm, started=depth > 0)
                x, residual = injection(s, e), None
                if damped and x is s:
                    x = s.clone()
                for layer in layers:
                    x, residual = call(layer, x, residual)
                if damped:
                    x, residual = damping(s, fold(x, residual), depth > 0, len(core)), None
                if kind == "each":
                    x, residual = norm_after(kind, fold(x, residual), norm), None
            if kind == "last":
                x, residual = norm_at_end(kind, fold(x, residual), norm), None
        if ends.projection is not None:
            x, residual = ends.leave(fold(x, residual)), None
        for layer in self.coda:
            x, residual = call(layer, x, residual)
        return x, residual

    def _initial_state(self, e: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # One sequence id for all requests, as transformers has by default: noise then depends on the position alone.
        return initial_state(self.config, e.view(1, -1, e.shape[-1]), positions.view(1, -1), None).view(e.shape)


def input_of(layer: nn.Module) -> Callable[..., Any]:
    """A forward for a listed `layer` that the recurrence stands in for: it returns its input."""
    return {
        "fused": lambda positions, hidden_states, residual=None, **kwargs: (hidden_states, residual),
        "plain": lambda positions, hidden_states, **kwargs: hidden_states,
        "transformers": lambda hidden_states, *args, **kwargs: hidden_states,
    }[convention_of(layer)]
