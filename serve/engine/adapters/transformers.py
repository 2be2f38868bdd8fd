"""A transformers RecurrentDepthForCausalLM in the engine's pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import get_layer_types_and_kwargs

from ....errors import UserError
from ....model.relaxation import matrix
from ....model.routed_rows import COUNTING
from ..attention.base import Attention
from ..compile import attend, register
from ..relaxation import by_depth, relax_linear

Args: TypeAlias = tuple[Any, ...]  # arguments of a transformers layer
Kwargs: TypeAlias = dict[str, Any]
Visit = Callable[[int, Tensor, Args, Kwargs], Tensor]  # (layer number, hidden states, its arguments) -> hidden states
NAME = "loopwise_lanes"  # the attention implementation of the model's config


class TransformersParts:
    """Runs the model's own layers on rows, with the engine's attention. The model is the engine's from then on.

    Raises UserError for a model whose layers cannot be given another attention.
    """

    def __init__(self, model: Any, length: int, depths: int):
        """length: positions that will be asked for. A model of learned positions may have one less: the token that
        fills it up never runs, but a wave may guess beyond it, at the last position then.   depths: the greatest R."""
        self.model, self.config = model, model.config
        self.injection, self.ends, self.damping = model.injection, model.ends, model.damping
        self.router = getattr(model, "router", None)
        self.needs_tokens, self.tokens = any(getattr(self.config.source_config, "value_embeddings", ())), torch.empty(0)
        source = model.source
        if not getattr(source, "_supports_attention_backend", False):
            raise UserError(
                f"{type(source).__name__}: its attention is fixed in its layers, and the engine cannot take its place; "
                "use transformers' generate"
            )
        others = {*get_layer_types_and_kwargs(self.config.source_config)[0]} - {"full_attention", "sliding_attention"}
        if others:
            raise UserError(
                f"{type(source).__name__}: the engine's cache holds keys and values of full and sliding attention, and "
                f"this model has layers of {', '.join(sorted(others))}; use transformers' generate"
            )
        if self.config.sharing != "cycle":
            raise UserError(f"sharing={self.config.sharing!r}: the engine runs models of sharing='cycle'")
        if self.config.source_config.model_type in COUNTING:
            raise UserError(
                f"{type(source).__name__}: its layers count the positions of a call, which are rows of many requests "
                "in the engine; use transformers' generate"
            )
        self.name = f"{NAME}_{id(self)}"  # an engine's own: the register is the process's
        AttentionInterface.register(self.name, self._attend)
        source.set_attn_implementation(self.name)
        self.number = register(self)
        self.attention: Attention | None = None
        self.layer, self.depths = 0, torch.empty(0)
        self.has_mask = False  # of the layer that runs
        self._visit: Visit | None = None
        self.taps = [m for m in source.modules() if type(m).__name__ == "Tap"]
        for tap in self.taps:
            tap.visit = self._visited
        self._relax()
        if self.config.time_conditioning:
            with torch.no_grad():
                model.time_conditioning.tabulate(max(depths, self.config.max_recurrences))
        self.device = model.get_input_embeddings().weight.device
        has = getattr(self.config, "max_position_embeddings", None) or length
        self.length = min(length, has)
        self.clamps = has < length
        self.arguments = self._arguments(torch.arange(self.length, device=self.device))

    def release(self) -> None:
        """Replace the attention in transformers' register, which would keep the model for as long as the process."""
        AttentionInterface.register(self.name, _released)

    def shapes(self) -> list[tuple[int, int]]:
        """(key-value heads, head size) of the attention in every layer: prelude, coda, core. Raises UserError where
        keys and values differ in size."""
        found: dict[int, tuple[int, int]] = {}

        name = type(self.model.source).__name__

        class Measure:
            def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **facts: Any):
                if k.shape != v.shape:
                    raise UserError(
                        f"{name}: a head's keys have {k.shape[2]} channels and its values {v.shape[2]}, and the "
                        "engine's cache holds both in one size; use transformers' generate"
                    )
                found[layer] = (k.shape[1], k.shape[2])
                return torch.zeros_like(q)

        self.attention = Measure()  # pyright: ignore[reportAttributeAccessIssue]
        more = self.config.source_config.num_attention_heads + 1  # so that it shows which dimension is the rows'
        position = torch.zeros(more, dtype=torch.long, device=self.device)
        x, self.tokens = self.embed(position, position), position
        for part in ("prelude", "coda", "core"):
            self.layers(part, x, position, position, position)
        return [found[layer] for layer in sorted(found)]

    @property
    def compilable(self) -> bool:
        """True where a pass of the core is one graph: parameters of a depth's own are looked up row by row, and neither
        tokens that layers embed nor times are inputs of it."""
        return not ((self.config.relaxation or {}).get("own") or self.needs_tokens or self.config.time_conditioning)

    # ---- the source model around the layers -----------------------------------------------------------------------
    def _visited(self, index: int, x: Tensor, args: Args, kwargs: Kwargs) -> Tensor:
        assert self._visit is not None
        return self._visit(index, x, args, kwargs)

    def _through(self, tokens: Tensor, positions: Tensor, visit: Visit) -> Any:
        """The source model's forward with `visit` in place of its layers."""
        self._visit = visit
        return self.model.source(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, return_dict=True, logits_to_keep=1
        )

    def _arguments(self, positions: Tensor) -> dict[int, tuple[Args, Kwargs]]:
        """The arguments that the source passes to each of its layers for these positions."""
        found: dict[int, tuple[Args, Kwargs]] = {}

        def note(index: int, x: Tensor, args: Args, kwargs: Kwargs) -> Tensor:
            found[index] = (args, kwargs)
            return x

        self._through(torch.zeros_like(positions), positions, note)
        return found

    def _of(self, value: Any, positions: Tensor) -> Any:
        """`value`, passed for all positions, for some of them."""
        if isinstance(value, tuple | list):
            return type(value)(self._of(part, positions) for part in value)
        if isinstance(value, Tensor):
            if value.dim() > 1 and value.shape[1] == self.length:
                return value[:, positions]
            if value.dim() == 1 and len(value) == self.length:
                return value[positions]
        return value

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        first: list[Tensor] = []

        def note(index: int, x: Tensor, args: Args, kwargs: Kwargs) -> Tensor:
            if not first:
                first.append(x)
            return x

        self._through(tokens, self._within(positions), note)
        return first[0][0]

    def _within(self, positions: Tensor) -> Tensor:
        return positions.clamp(max=self.length - 1) if self.clamps else positions

    def logits(self, x: Tensor) -> Tensor:
        last = len(self.taps) - 1
        self._visit = lambda index, hidden, args, kwargs: x[None] if index == last else hidden
        tokens = torch.zeros(1, len(x), dtype=torch.long, device=x.device)
        return self.model.source(input_ids=tokens, use_cache=False, return_dict=True).logits[0]

    def norm_between(self, s: Tensor) -> Tensor:
        return self.model._final_norm(s)

    def norm_each(self, s: Tensor) -> Tensor:
        return self.model.recurrence_norm(s)

    def gate(self, s: Tensor) -> Tensor:
        return self.model.exit_gate(s, self.model._final_norm)

    # ---- the layers -----------------------------------------------------------------------------------------------
    def layers(
        self, part: str, x: Tensor, positions: Tensor, depths: Tensor | None = None, limits: Tensor | None = None
    ) -> Tensor:
        config = self.config
        start = {"prelude": 0, "coda": len(config.prelude), "core": len(config.prelude) + len(config.coda)}[part]
        if depths is not None:
            self.depths = depths
        x, positions = x[None], self._within(positions)
        passed: dict[int, tuple[Args, Kwargs]] = {}
        for n, (layer, source) in enumerate(zip(getattr(self.model, part), getattr(config, part), strict=True)):
            if source not in passed:
                args, kwargs = self.arguments[source]
                passed[source] = (
                    self._of(args, positions),
                    {name: self._of(value, positions) for name, value in kwargs.items()},
                )
            args, kwargs = passed[source]
            if self.needs_tokens:
                kwargs["token_ids"] = self.tokens[None]
            if config.time_conditioning and part == "core":
                assert depths is not None
                assert limits is not None
                kwargs = {**kwargs, "time": self.model.time_conditioning.row(depths, limits)}
            self.layer = start + n
            self.has_mask = any(isinstance(value, Tensor) and value.dim() == 4 for value in (*args, *kwargs.values()))
            x = layer(x, *args, **kwargs)
            x = x[0] if isinstance(x, tuple) else x
        return x[0]

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: q, k, v [1, H or K, N, C] -> [1, N, H, C]. Raises UserError for a mask
        that the layer made itself."""
        if attention_mask is not None and not self.has_mask:
            raise UserError(
                f"{type(module).__name__} gives attention a mask of its own, which the engine's attention does not "
                "take; use transformers' generate"
            )
        out = attend(
            self,
            self.layer,
            *(t[0].transpose(0, 1) for t in (query, key, value)),
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
        )
        return out[None], None

    def _relax(self) -> None:
        """Let the core's layers use LoRA, norms and biases of each row's own depth."""
        if not self.config.relaxation:
            return
        for relaxation in self.model.relaxation:
            relaxation.detach()  # its forwards know one depth for all rows
            biases: dict[Any, Tensor | None] = {}
            for here, module, names in relaxation.own.values():
                values = {name: getattr(here, name).detach() for name in names}
                module.forward = by_depth(module, values, lambda: self.depths)
                biases[module] = values.get("bias")
            for factors, linear in relaxation.factors.values():
                own = biases.get(linear)
                linear._forward_hooks.clear()  # of an engine before this one
                relax_linear(linear, factors, lambda: self.depths, lambda _, linear=linear: matrix(linear), own)


def _released(*_: Any, **__: Any) -> Any:
    """The attention of a model whose engine is gone."""
    raise RuntimeError("this model was an engine's, which is gone: load the model again")
