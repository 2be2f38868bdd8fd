"""vLLM's model of the source architecture in the engine's pieces.

The source model's forward still embeds the tokens, and norms the end; its layers are taps that say what they were
given, or hand in what the rest of it is to have. Their attention is the engine's: one paged cache for every layer and
depth, of which vLLM is told by `Attention` objects that never run.
Shapes: N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention

from ..engine import attention as engine
from ..engine.compiled import attend, own
from .layers import attention_copy, convention_of, fold


class VllmParts:
    """The pieces of `model`, a RecurrentDepthForCausalLM of vLLM, whose layers are the engine's from then on.

    `attention` is set once the cache is there.
    """

    def __init__(self, model: Any, layers: list[Any], slots: int, context: dict[str, Any]):
        """`layers`: prelude, core, coda, one for each set of weights. `slots`: of a core layer. `context`: vLLM's
        static forward context, from which it allocates a cache for each Attention."""
        self.model, self.config, self.injection = model, model.config, model.injection
        self.router = getattr(model, "router", None)
        config = self.config
        prelude, core = len(config.prelude), len(config.core)
        self.by_part = {
            "prelude": layers[:prelude],
            "core": layers[prelude : prelude + core],
            "coda": layers[prelude + core :],
        }
        self.outer = prelude + len(config.coda)
        self.convention = convention_of(layers[0])
        self.number = own(self)
        self.attention: engine.Attention | None = None
        self.caches: list[list[Attention]] = []  # by the engine's number of the layer, by slot
        self.depths = torch.empty(0)
        self._taken: list[tuple[tuple, dict]] | None = None
        self._first_suffices = False
        self._handed: torch.Tensor | None = None
        listed = {id(layer): index for index, layer in enumerate(layers)}
        for layer in layers:
            _attention_of(layer)  # raises for what has none, or two
            context.pop(_attention_of(layer).layer_name)
        for part in ("prelude", "coda", "core"):
            for layer in self.by_part[part]:
                self._take_attention(layer, listed[id(layer)], slots if part == "core" else 1, context)
        for index, layer in enumerate(layers):
            layer.forward_of_layer = layer.forward
            layer.forward = self._tap(index, last=index == len(layers) - 1)
        for relaxation in model.relaxation:
            relaxation.by_row(lambda: self.depths)

    def _take_attention(self, layer: Any, index: int, slots: int, context: dict[str, Any]) -> None:
        """Let `layer` attend as the engine says, and register a cache for each of its slots: prelude, coda, then core
        by depth, so that depth is a constant distance in memory."""
        attention, number = _attention_of(layer), len(self.caches)
        core = len(self.config.core)
        names = [number + slot * core for slot in range(slots)]
        self.caches.append([attention_copy(attention, index, name, context) for name in names])
        heads, kv_heads = attention.num_heads, attention.num_kv_heads

        def forward(query, key, value, output_shape=None):
            """vLLM's Attention.forward: [N, H C] -> [N, H C]."""
            n = query.numel() // (heads * attention.head_size)
            q, k, v = query.view(n, heads, -1), key.view(n, kv_heads, -1), value.view(n, kv_heads, -1)
            out = attend(self, number, q, k, v)
            return out.reshape(output_shape if output_shape is not None else query.shape)

        attention.forward = forward  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def compilable(self) -> bool:
        """Whether a pass of the core is one graph: vLLM's Transformers backend asks the source model for its tables."""
        return self.convention != "transformers"

    # ---- the source model around the layers -----------------------------------------------------------------------
    def _tap(self, index: int, last: bool) -> Any:
        def tap(*args, **kwargs):
            if self._taken is not None:
                self._taken.append((args, kwargs))
                if last or self._first_suffices:
                    raise _Taken
            handed = self._handed if last else None
            if self.convention == "transformers":
                return args[0] if handed is None else handed[None]
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[1]
            x = x if handed is None else handed
            return x if self.convention == "plain" else (x, torch.zeros_like(x) if last else None)

        return tap

    def _given(self, tokens: torch.Tensor, positions: torch.Tensor, first: bool = False) -> list[tuple[tuple, dict]]:
        """What the source model passes to each of its layers, or to the first alone."""
        self._taken, self._first_suffices = (taken := []), first
        try:
            self.model.source(tokens, positions)
        except _Taken:
            pass
        finally:
            self._taken = None
        return taken

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._given(tokens, positions, first=True)[0]
        if self.convention == "transformers":
            return args[0][0]
        return kwargs["hidden_states"] if "hidden_states" in kwargs else args[1]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self._handed = x
        try:
            return self.model.source.compute_logits(self.model.source(zeros, zeros))
        finally:
            self._handed = None

    def norm_between(self, s: torch.Tensor) -> torch.Tensor:
        return self.model.final_norm(s)

    def norm_each(self, s: torch.Tensor) -> torch.Tensor:
        return self.model.recurrence_norm(s)

    def gate(self, s: torch.Tensor) -> torch.Tensor:
        return self.model.exit_gate(self.model.final_norm(s)).squeeze(-1)

    # ---- the layers -----------------------------------------------------------------------------------------------
    def layers(self, part: str, x: torch.Tensor, positions: torch.Tensor, depths: torch.Tensor | None) -> torch.Tensor:
        if part == "core":
            assert depths is not None, "the core runs at depths"
            self.depths = depths
        if self.convention == "transformers" and self.by_part[part]:
            return self._transformers_layers(part, x, positions)
        if self.convention == "fused" and part == "core":
            x = x.clone()  # on a GPU, vLLM's norms write into the residual that they get, which is the caller's state
        residual = None
        for layer in self.by_part[part]:
            if self.convention == "fused":
                x, residual = layer.forward_of_layer(positions, x, residual)
            else:
                x = layer.forward_of_layer(positions, x)
        return fold(x, residual)

    def _transformers_layers(self, part: str, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Layers of vLLM's Transformers backend, which get rotary tables of these positions."""
        given = self._given(torch.zeros_like(positions), positions)
        first = {"prelude": 0, "core": len(self.config.prelude), "coda": len(given) - len(self.config.coda)}[part]
        x = x[None]
        for layer, (args, kwargs) in zip(self.by_part[part], given[first:], strict=False):
            x = layer.forward_of_layer(x, *args[1:], **kwargs)
        return x[0]


class _Taken(Exception):
    """The source model has passed all that its layers get; the rest of its forward is not needed."""


def _attention_of(layer: nn.Module) -> Attention:
    found = [module for module in layer.modules() if isinstance(module, Attention)]
    if len(found) != 1:
        raise ValueError(f"{type(layer).__name__} has {len(found)} attentions; the lane engine runs layers of one")
    return found[0]
