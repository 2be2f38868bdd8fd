"""The sandwich architecture (Huginn, Ouro) as vLLM's Llama with four norms a layer. Shapes: N tokens, D width."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

from ...model.configuration_sandwich import SandwichConfig


class SandwichLayer(LlamaDecoderLayer):
    """x + norm(attn(norm(x))), or norm(x + attn(norm(x))) with `norm_after_residual`; the same for the MLP."""

    def __init__(self, vllm_config, prefix: str = "", config: SandwichConfig | None = None, **kwargs):
        sandwich: SandwichConfig = config or vllm_config.model_config.hf_config
        sandwich.qkv_bias = sandwich.qk_bias or sandwich.attention_bias  # vLLM's name
        super().__init__(vllm_config, prefix, sandwich, **kwargs)
        self.after = sandwich.norm_after_residual
        self.pre_feedforward_layernorm = RMSNorm(sandwich.hidden_size, eps=sandwich.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(sandwich.hidden_size, eps=sandwich.rms_norm_eps)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [N, D] -> (hidden_states, None): the residual of Llama's layers is folded in already."""
        attended = self.self_attn(positions=positions, hidden_states=self.input_layernorm(hidden_states))
        x = self._join(hidden_states, attended, self.post_attention_layernorm)
        return self._join(x, self.mlp(self.pre_feedforward_layernorm(x)), self.post_feedforward_layernorm), None

    def _join(self, x: torch.Tensor, new: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        return norm(new + x) if self.after else x + norm(new)


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0},
)
class SandwichModel(LlamaModel):
    """Llama's model with scaled embeddings. The recurrence in place of its layers returns a residual for its norm."""

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids) * self.config.embedding_scale


class SandwichForCausalLM(LlamaForCausalLM):
    """vLLM's Llama with sandwich layers; its checkpoints have no bias of values."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=SandwichLayer)

    def _init_model(self, vllm_config, prefix: str = "", layer_type=SandwichLayer):
        return SandwichModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(self._with_value_bias(weights))

    def _with_value_bias(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        """`weights`, with a zero bias of values: vLLM's fused module has one bias for queries, keys and values."""
        for name, tensor in weights:
            yield name, tensor
            if name.endswith("k_proj.bias") and not self.config.attention_bias:
                yield name.replace("k_proj", "v_proj"), torch.zeros_like(tensor)
