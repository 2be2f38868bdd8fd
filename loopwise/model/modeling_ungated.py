"""The ungated architecture on transformers' Llama. Shapes: B batch, T tokens, D width, H heads, C head size."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward

from .configuration_ungated import UngatedConfig

GATE_WIDTH = 32  # channels of a layer's input that the gate of its value embeddings reads
EPS = torch.finfo(torch.float32).eps  # of the norm of queries and keys


class ValueEmbedding(nn.Module):
    """Embeddings of the tokens for the values of one layer, each head's times 2 sigmoid(gate x[: GATE_WIDTH])."""

    def __init__(self, vocabulary: int, width: int, heads: int, head_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, heads * head_dim)
        self.gate = nn.Linear(min(width, GATE_WIDTH), heads, bias=False)

    def forward(self, x: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """x [.., D], the attention's input, and token_ids [..] -> [.., H, C], to be added to the values."""
        gate = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))
        return gate[..., None] * self.embedding(token_ids).unflatten(-1, (gate.shape[-1], -1))


class UngatedAttention(nn.Module):
    """Attention with the config's positions, norms of queries and keys, and value embeddings."""

    def __init__(self, config: UngatedConfig, layer_idx: int):
        super().__init__()
        heads, shared = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim or config.hidden_size // heads
        self.num_key_value_groups, self.scaling, self.is_causal = heads // shared, self.head_dim**-0.5, True
        for name, count in (("q_proj", heads), ("k_proj", shared), ("v_proj", shared)):
            setattr(self, name, nn.Linear(config.hidden_size, count * self.head_dim, bias=config.attention_bias))
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.attention_bias)
        if config.value_embeddings and config.value_embeddings[layer_idx]:
            sizes = (config.vocab_size, config.hidden_size, shared, self.head_dim)
            self.value_embedding = ValueEmbedding(*sizes)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        token_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden_states [B, T, D] -> [B, T, D]. token_ids [B, T], where the layer has value embeddings."""
        q, k, v = (
            getattr(self, f"{name}_proj")(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in "qkv"
        )
        if hasattr(self, "value_embedding"):
            v = v + self.value_embedding(hidden_states, token_ids).transpose(1, 2)
        if not self.config.learned_positions:
            q, k = cast(Any, apply_rotary_pos_emb)(q, k, *position_embeddings)
        if self.config.qk_norm:
            q, k = (nn.functional.rms_norm(each, (self.head_dim,), eps=EPS) for each in (q, k))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
            cast(Any, self.config)._attn_implementation, cast(Any, eager_attention_forward)
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        out, _ = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2))


class UngatedMLP(nn.Module):
    """down(act(up x))."""

    def __init__(self, config: UngatedConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn: nn.Module = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return self.down_proj(self.act_fn(self.up_proj(x)))


def _norm(config: UngatedConfig) -> nn.Module:
    """A norm of a layer, with a weight or without."""
    if config.norm_weights:
        return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    return nn.RMSNorm(config.hidden_size, config.rms_norm_eps, elementwise_affine=False)


class UngatedLayer(GradientCheckpointingLayer):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: UngatedConfig, layer_idx: int):
        super().__init__()
        self.self_attn, self.mlp = UngatedAttention(config, layer_idx), UngatedMLP(config)
        self.input_layernorm, self.post_attention_layernorm = _norm(config), _norm(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """hidden_states [B, T, D] -> [B, T, D]; the other arguments go to the attention."""
        x = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        return x + self.mlp(self.post_attention_layernorm(x))


class UngatedModel(LlamaModel):
    """Llama's model with ungated layers."""

    config_class = UngatedConfig
    _no_split_modules = ["UngatedLayer"]
    _can_record_outputs = {"hidden_states": UngatedLayer, "attentions": UngatedAttention}

    def __init__(self, config: UngatedConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(UngatedLayer(config, i) for i in range(config.num_hidden_layers))
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.post_init()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Llama's. Raises ValueError for embeddings without token ids where layers have value embeddings."""
        config = cast(UngatedConfig, self.config)
        if any(config.value_embeddings):
            if input_ids is None:
                raise ValueError("inputs_embeds: this model's layers embed the tokens, too, and need input_ids")
            kwargs["token_ids"] = input_ids
        if inputs_embeds is None:
            inputs_embeds = cast(torch.Tensor, self.embed_tokens(cast(torch.Tensor, input_ids)))
        if config.learned_positions:
            if position_ids is None:
                position_ids = _positions(inputs_embeds, attention_mask, past_key_values)
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids)
        return cast(Any, super().forward)(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class UngatedForCausalLM(LlamaForCausalLM):
    """Llama's causal language model with ungated layers."""

    config_class = UngatedConfig
    _no_split_modules = ["UngatedLayer"]

    def __init__(self, config: UngatedConfig):
        super().__init__(config)
        self.model = UngatedModel(config)
        self.post_init()


def _positions(x: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> torch.Tensor:
    """Positions [B or 1, T] of x [B, T, D], those of left padding not counted; the mask [B, T] covers the cache."""
    if mask is not None and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :]
    past = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(x.shape[1], device=x.device) + past)[None]


AutoModelForCausalLM.register(UngatedConfig, UngatedForCausalLM, exist_ok=True)
