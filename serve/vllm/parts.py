"""vLLM's model of the source architecture in the engine's pieces.

The source model's forward still embeds the tokens and runs the final norm. In place of its layers it has taps: they
record their arguments, or return a given state. Attention is the engine's. `Attention` objects that never run make vLLM
allocate a paged cache for every layer and depth. Shapes: N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention

from ..engine.attention import base as engine
from ..engine.compile import add, attend, register
from .layers import attention_copy, convention_of, fold


class VllmParts:
    """The pieces of `model`, a RecurrentDepthForCausalLM of vLLM: the engine's `Parts`. It changes the model's layers.

    `attention` is set by the worker, once vLLM has allocated the cache.
    """

    def __init__(self, model: Any, layers: list[Any], slots: int, context: dict[str, Any]):
        """layers: prelude, core, coda, one for each set of weights.   slots: caches of a core layer.   context: vLLM's
        static forward context, from which it allocates a cache for each Attention. It loses the layers' own.

        Raises ValueError for a layer without exactly one Attention.
        """
        self.model, self.config = model, model.config
        self.injection, self.ends, self.damping = model.injection, model.ends, model.damping
        self.router = getattr(model, "router", None)
        config = self.config
        self.needs_tokens, self.tokens = any(getattr(config.source_config, "value_embeddings", ())), torch.empty(0)
        prelude, core = len(config.prelude), len(config.core)
        self.by_part = {
            "prelude": layers[:prelude],
            "core": layers[prelude : prelude + core],
            "coda": layers[prelude + core :],
        }
        self.outer = prelude + len(config.coda)
        self.convention = convention_of(layers[0])
        self.number = register(self)
        self.attention: engine.Attention | None = None
        self.caches: list[list[Attention]] = []  # by layer number (prelude, coda, core), by slot
        self.depths = torch.empty(0)
        self._recorded: list[tuple[tuple, dict]] | None = None
        self._first_suffices = False
        self._replacement: torch.Tensor | None = None
        listed = {id(layer): index for index, layer in enumerate(layers)}
        for layer in layers:
            context.pop(_attention_of(layer).layer_name)
        for part in ("prelude", "coda", "core"):
            for layer in self.by_part[part]:
                self._take_attention(layer, listed[id(layer)], slots if part == "core" else 1, context)
        for index, layer in enumerate(layers):
            layer.forward_of_layer = layer.forward
            layer.forward = self._tap(index, last=index == len(layers) - 1)
        for relaxation in model.relaxation:
            relaxation.relax_rows(lambda: self.depths)

    def _take_attention(self, layer: Any, index: int, slots: int, context: dict[str, Any]) -> None:
        """Give `layer` the engine's attention, and register a cache for each of its slots in `context`.

        Caches are numbered: prelude, coda, then core by depth, so that depth is a constant distance in memory.
        """
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
        """True where a pass of the core is one graph. vLLM's Transformers backend reads rotary tables in between, and
        neither tokens that layers embed nor times are inputs of it."""
        return not (self.convention == "transformers" or self.needs_tokens or self.config.time_conditioning)

    # ---- the source model around the layers -----------------------------------------------------------------------
    def _tap(self, index: int, last: bool) -> Any:
        """A forward in place of layer `index`: it records its arguments, or as the last returns `_replacement`."""

        def tap(*args, **kwargs):
            if self._recorded is not None:
                self._recorded.append((args, kwargs))
                if last or self._first_suffices:
                    raise _Recorded
            replacement = self._replacement if last else None
            if self.convention == "transformers":
                return args[0] if replacement is None else replacement[None]
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[1]
            x = x if replacement is None else replacement
            return x if self.convention == "plain" else (x, torch.zeros_like(x) if last else None)

        return tap

    def _arguments(
        self, tokens: torch.Tensor, positions: torch.Tensor, first: bool = False
    ) -> list[tuple[tuple, dict]]:
        """The arguments that the source model passes to each of its layers, or to the first alone."""
        self._recorded, self._first_suffices = (recorded := []), first
        try:
            self.model.source(tokens, positions)
        except _Recorded:
            pass
        finally:
            self._recorded = None
        return recorded

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """tokens, positions [N] -> embeddings [N, D]."""
        args, kwargs = self._arguments(tokens, positions, first=True)[0]
        if self.convention == "transformers":
            return args[0][0]
        return kwargs["hidden_states"] if "hidden_states" in kwargs else args[1]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Final norm and head: x [N, D] -> [N, V]."""
        zeros = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self._replacement = x
        try:
            return self.model.source.compute_logits(self.model.source(zeros, zeros))
        finally:
            self._replacement = None

    def norm_between(self, s: torch.Tensor) -> torch.Tensor:
        """The source's final norm of s [N, D]."""
        return self.model.final_norm(s)

    def norm_each(self, s: torch.Tensor) -> torch.Tensor:
        """The recurrence norm of s [N, D]."""
        return self.model.recurrence_norm(s)

    def gate(self, s: torch.Tensor) -> torch.Tensor:
        """Logits [N] of the exit gate for s [N, D]."""
        return self.model.exit_gate(s, self.model.final_norm)

    # ---- the layers -----------------------------------------------------------------------------------------------
    def layers(
        self,
        part: str,
        x: torch.Tensor,
        positions: torch.Tensor,
        depths: torch.Tensor | None = None,
        limits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [N, D] through the layers of `part` (prelude, core, coda). depths: the core's, [N] or [1].   limits: R [N]
        of the rows, for time conditioning."""
        if part == "core":
            assert depths is not None, "the core runs at depths"
            self.depths = depths
            if self.config.time_conditioning:
                row = self.model.time_conditioning.row(depths, limits)
                for modulation in self.model.time_conditioning.layers:
                    modulation.at(row)
        if self.convention == "transformers" and self.by_part[part]:
            return self._transformers_layers(part, x, positions)
        if self.convention == "fused" and part == "core":
            x = x.clone()  # on a GPU, vLLM's norms write into the residual that they get: the caller's state
        residual, given = None, {"token_ids": self.tokens} if self.needs_tokens else {}
        for layer in self.by_part[part]:
            if self.convention == "fused":
                x, residual = layer.forward_of_layer(positions, x, residual, **given)
            else:
                x = layer.forward_of_layer(positions, x, **given)
        read_on = self.damping.kind != 1 or self.config.recurrence_norm == "each"  # in the same compiled function
        return add(x, residual) if part == "core" and read_on else fold(x, residual)

    def _transformers_layers(self, part: str, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The layers of vLLM's Transformers backend, with rotary tables of these positions."""
        given = self._arguments(torch.zeros_like(positions), positions)
        first = {"prelude": 0, "core": len(self.config.prelude), "coda": len(given) - len(self.config.coda)}[part]
        x = x[None]
        for layer, (args, kwargs) in zip(self.by_part[part], given[first:], strict=False):
            x = layer.forward_of_layer(x, *args[1:], **kwargs)
        return x[0]


class _Recorded(Exception):
    """Ends the source model's forward, once its layers' arguments are recorded."""


def _attention_of(layer: nn.Module) -> Attention:
    """The one Attention in `layer`. Raises ValueError for another number of them."""
    found = [module for module in layer.modules() if isinstance(module, Attention)]
    if len(found) != 1:
        raise ValueError(f"{type(layer).__name__} has {len(found)} attentions; the lane engine runs layers of one")
    return found[0]
