"""A recurrent-depth model on vLLM's own model of the source architecture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import maybe_prefix
from vllm.transformers_utils.config import _CONFIG_REGISTRY

from ...errors import UserError
from ...model import RecurrentDepthConfig
from ...model.damping import Damping
from ...model.ends import Ends
from ...model.exit_gate import ExitGate
from ...model.injection import Injection
from ...model.router import Router
from ...model.source_layers import FINAL_NORM
from ...model.time_conditioning import TimeConditioning
from ...unroll import config_with_layers
from ..api.architectures import vllm_architecture
from ..api.lanes import is_lanes
from ..api.limits import check_depth, check_model, check_packed, check_router
from ..completeness import Completeness
from ..engine.kv import policy_of
from .arguments import check_vllm_config
from .fixed.recurrence import Between, Recurrence, input_of
from .fixed.relaxation import relax_copy
from .parts import VllmParts
from .relaxation import Relaxation

# Parts of a checkpoint that are no layers, with the names that they have here.
OURS = ("injection", "ends", "damping", "recurrence_norm", "exit_gate", "router", "time_conditioning")


class RecurrentDepthForCausalLM(nn.Module):
    """Embeddings, final norm, head and logits are those of vLLM's model of the source.

    In the lane engine the engine runs its layers (`parts`). In the fixed engine a `Recurrence` does, at one depth:
    `num_recurrences` of the config, which `--hf-overrides` can replace.

    Raises UserError for a config or vLLM settings that cannot be served, ValueError for vLLM layers that differ from
    the source's.
    """

    source: Any  # vLLM's model, of whichever class

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = cast(RecurrentDepthConfig, vllm_config.model_config.hf_config)
        check_depth(config.num_recurrences, config.max_recurrences)
        check_vllm_config(vllm_config, is_lanes(vllm_config))
        check_model(vars(config), routed=is_lanes(vllm_config))
        if config.router:
            check_router(config.router)
            check_packed(config.router, config.source_config)
        self.config = config
        # One layer for each set of weights: prelude, core, coda.
        unique = config_with_layers(config.source_config, [*config.prelude, *config.core, *config.coda])
        if unique.model_type in _CONFIG_REGISTRY:  # vLLM has its own config class (0.31: nemotron)
            unique = _CONFIG_REGISTRY[unique.model_type].from_dict(unique.to_dict())
        inner = vllm_config.with_hf_config(unique, architectures=[vllm_architecture(unique.model_type)])
        inner.model_config.hf_text_config = inner.model_config.hf_config
        self.source = initialize_model(inner, prefix=maybe_prefix(prefix, "source"))
        self.layers_name = layer_list_name(self.source, unique.num_hidden_layers)
        layers: list[nn.Module] = list(self.source.get_submodule(self.layers_name))
        check_windows(layers, unique)
        self.injection = Injection(config.injection, config.hidden_size)
        self.ends = Ends(config.prelude_norm, config.state_projection, config.hidden_size, config.norm_eps)
        self.damping = Damping(config.recurrence_damping, config.hidden_size)
        if config.recurrence_norm == "each":
            self.recurrence_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        if config.router:
            self.router = Router(config.hidden_size, config.router)
        if config.exit_gate:  # the fixed engine loads it, and never uses it
            self.exit_gate = ExitGate(config.hidden_size, config.exit_gate_norm)
        core = layers[len(config.prelude) : len(config.prelude) + len(config.core)]
        self.relaxation = nn.ModuleList(Relaxation(layer, **config.relaxation) for layer in core if config.relaxation)
        if config.time_conditioning:
            if not is_lanes(vllm_config):
                raise UserError("time_conditioning is served by the lane engine: leave out engine=fixed")
            given: dict[str, Any] = {"scale": [], "gate": [], **config.time_conditioning}
            self.time_conditioning = TimeConditioning(nn.ModuleList(core), config.hidden_size, **given)
        context = vllm_config.compilation_config.static_forward_context
        self.parts: VllmParts | None = None
        if is_lanes(vllm_config):
            self.parts = VllmParts(self, layers, policy_of(config).slots, context)
            return
        between = Between(self.injection, self.ends, self.damping, self._norm())
        self.recurrence = Recurrence(config, config.num_recurrences, layers, between, context)
        for depth, views in enumerate(cast(Any, self.recurrence.core)):
            for relaxation, layer in zip(cast(Any, self.relaxation), views, strict=False):
                relax_copy(relaxation, layer, depth)
        for layer in layers[:-1]:
            layer.forward = input_of(layer)
        layers[-1].forward = self.recurrence.forward

    @property
    def final_norm(self) -> nn.Module:
        """The final norm of vLLM's model of the source."""
        return self.source.get_submodule(FINAL_NORM)

    def _norm(self) -> nn.Module | None:
        """The norm that `recurrence_norm` of the config names; None without one."""
        kind = self.config.recurrence_norm
        if kind == "none":
            return None
        return self.recurrence_norm if kind == "each" else self.final_norm

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [N] -> [N, D]."""
        return self.source.embed_input_ids(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None) -> torch.Tensor:
        return self.source(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.source.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a recurrent-depth checkpoint. Returns the names of the parameters that it filled.

        Raises ValueError for missing or unexpected tensors, for tensors that vLLM's implementation ignores, and for
        parameters that the checkpoint does not fill.
        """
        loaded: set[str] = set()
        completeness = Completeness(self.config)

        def source_weights():
            for name, tensor in weights:
                tensor = completeness.watch(name, tensor)
                part, _, rest = name.partition(".")
                if part in OURS:
                    target = self.router.bias if name == "router.bias" else self.get_parameter(name)
                    # Where weights are loaded again, vLLM has given the parameter a loader.
                    getattr(target, "weight_loader", default_weight_loader)(target, tensor)
                    loaded.add(name)
                elif part == "relaxation":
                    number, _, rest = rest.partition(".")
                    cast(Relaxation, self.relaxation[int(number)]).load(rest, tensor)
                else:
                    yield source_name(name, self.config, self.layers_name), tensor

        loaded.update(f"source.{name}" for name in self.source.load_weights(source_weights()))
        if self.config.time_conditioning:
            with torch.no_grad():
                self.time_conditioning.tabulate(self.config.max_recurrences)
        completeness.check_complete()
        completeness.check_read()
        for number, relaxation in enumerate(cast(Iterable[Relaxation], self.relaxation)):
            relaxation.finish()
            layer = f"source.{self.layers_name}.{len(self.config.prelude) + number}"
            loaded.update(f"{layer}.{name}" for name in relaxation.replaced())
            loaded.update(f"relaxation.{number}.{name}" for name, _ in relaxation.named_parameters())
        missing = {name for name, _ in self.named_parameters()} - loaded
        if missing:
            raise ValueError(f"vLLM's model has parameters that the checkpoint does not fill: {sorted(missing)}")
        return loaded


def source_name(name: str, config: RecurrentDepthConfig, layers: str) -> str:
    """The source architecture's name for checkpoint tensor `name`. `layers`: the name of its list of layers.

    The source has as many layers as the checkpoint has sets of weights: prelude, core, coda in this order. Raises
    ValueError for a tensor of another part.
    """
    part, _, rest = name.partition(".")
    start = {"prelude": 0, "core": len(config.prelude), "coda": len(config.prelude) + len(config.core)}
    if part in start:
        number, _, rest = rest.partition(".")
        return f"{layers}.{start[part] + int(number)}.{rest}"
    if part != "source":
        raise ValueError(f"{name!r} is not the name of a recurrent-depth checkpoint's tensor")
    return rest


def layer_list_name(model: nn.Module, count: int) -> str:
    """Dotted name of the list of `count` layers inside vLLM's model, such as `model.layers`. Raises ValueError without
    one."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not names:
        raise ValueError(f"vLLM's {type(model).__name__} has no list of {count} layers")
    return names[0]


def check_windows(layers: list[nn.Module], config) -> None:
    """Raises ValueError where the sliding window of one of vLLM's layers differs from the source config's."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * len(layers)
    for number, (layer, kind) in enumerate(zip(layers, types, strict=True)):
        want = window if kind == "sliding_attention" else None
        for attention in (m for m in layer.modules() if isinstance(m, Attention)):
            if attention.sliding_window != want:
                raise ValueError(
                    f"vLLM's {type(layer).__name__} {number} has a sliding window of {attention.sliding_window}, "
                    f"the source config has {want}"
                )
