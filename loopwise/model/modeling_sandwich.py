"""The sandwich architecture: transformers' Llama with four norms a layer. Shapes: B batch, T tokens, D width."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from .configuration_sandwich import SandwichConfig


class SandwichAttention(LlamaAttention):
    """Llama's attention; with `config.qk_bias`, queries and keys have a bias."""

    def __init__(self, config: SandwichConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.qk_bias:
            for name in ("q_proj", "k_proj"):
                linear = getattr(self, name)
                setattr(self, name, nn.Linear(linear.in_features, linear.out_features, bias=True))


class SandwichLayer(GradientCheckpointingLayer):
    """x + norm(attn(norm(x))), or norm(x + attn(norm(x))) with `norm_after_residual`; the same for the MLP."""

    def __init__(self, config: SandwichConfig, layer_idx: int):
        super().__init__()
        self.after = config.norm_after_residual
        self.self_attn = SandwichAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_feedforward_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """hidden_states [B, T, D] -> [B, T, D]; the other arguments go to the attention."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        x = self._join(hidden_states, attended, self.post_attention_layernorm)
        return self._join(x, self.mlp(self.pre_feedforward_layernorm(x)), self.post_feedforward_layernorm)

    def _join(self, x: torch.Tensor, new: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """The residual x [B, T, D] and the output `new` of attention or MLP, added and normed."""
        return norm(new + x) if self.after else x + norm(new)


class ScaledEmbedding(nn.Embedding):
    """Embeddings times `scale`."""

    def __init__(self, size: int, width: int, padding: int | None, scale: float):
        super().__init__(size, width, padding)
        self.scale = scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """ids [B, T] -> [B, T, D]."""
        return super().forward(input) * self.scale


class SandwichModel(LlamaModel):
    """Llama's model with sandwich layers."""

    config_class = SandwichConfig
    _no_split_modules = ["SandwichLayer"]
    _can_record_outputs = {"hidden_states": SandwichLayer, "attentions": SandwichAttention}

    def __init__(self, config: SandwichConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(SandwichLayer(config, i) for i in range(config.num_hidden_layers))
        if config.embedding_scale != 1:
            size = (config.vocab_size, config.hidden_size, config.pad_token_id)
            self.embed_tokens = ScaledEmbedding(*size, config.embedding_scale)
        self.post_init()


class SandwichForCausalLM(LlamaForCausalLM):
    """Llama's causal language model with sandwich layers."""

    config_class = SandwichConfig
    _no_split_modules = ["SandwichLayer"]

    def __init__(self, config: SandwichConfig):
        super().__init__(config)
        self.model = SandwichModel(config)
        self.post_init()


AutoModelForCausalLM.register(SandwichConfig, SandwichForCausalLM, exist_ok=True)
