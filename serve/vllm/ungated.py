"""The ungated architecture (Parcae, LoopFormer) on vLLM's Llama. Shapes: N tokens, D width, K key-value heads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from ...model.configuration_ungated import UngatedConfig
from ...model.modeling_ungated import EPS, ValueEmbedding

MAPPER = WeightsMapper(orig_to_new_stacked={f".{name}_proj": (".qkv_proj", name) for name in "qkv"})


class UngatedAttention(LlamaAttention):
    """Llama's attention with the config's positions, norms of queries and keys, and value embeddings."""

    def __init__(self, config: UngatedConfig, layer_idx: int, **kwargs: Any):
        super().__init__(config=config, **kwargs)
        self.learned, self.normed = config.learned_positions, config.qk_norm
        if config.value_embeddings and config.value_embeddings[layer_idx]:
            sizes = (config.vocab_size, config.hidden_size, self.total_num_kv_heads, self.head_dim)
            self.value_embedding = ValueEmbedding(*sizes)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, positions: torch.Tensor, hidden_states: torch.Tensor, token_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """positions [N], hidden_states [N, D] -> [N, D]. token_ids [N], where the layer has value embeddings."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if hasattr(self, "value_embedding"):
            assert token_ids is not None
            v = v + self._values(hidden_states, token_ids)
        if not self.learned:
            q, k = self.rotary_emb(positions, q, k)
        if self.normed:
            q, k = (self._norm(each) for each in (q, k))
        return self.o_proj(self.attn(q, k, v))[0]

    def _values(self, x: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of the tokens, times their gates, for this rank's values [N, K C]."""
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        first = rank * self.total_num_kv_heads // ranks
        return self.value_embedding(x, token_ids)[:, first : first + self.num_kv_heads].flatten(1)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, heads C], each head over its root mean square."""
        heads = x.unflatten(-1, (-1, self.head_dim))
        return nn.functional.rms_norm(heads, (self.head_dim,), eps=EPS).flatten(1)


class UngatedMLP(nn.Module):
    """down(act(up x))."""

    def __init__(self, config: UngatedConfig, quant_config: Any, prefix: str):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        options: dict[str, Any] = {"bias": config.mlp_bias, "quant_config": quant_config}
        self.up_proj = ColumnParallelLinear(width, inner, **options, prefix=f"{prefix}.up_proj")
        self.down_proj = RowParallelLinear(inner, width, **options, prefix=f"{prefix}.down_proj")
        self.act_fn = get_act_fn(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, D] -> [N, D]."""
        return self.down_proj(self.act_fn(self.up_proj(x)[0]))[0]


def _norm(config: UngatedConfig) -> nn.Module:
    """A norm of a layer, with a weight or without."""
    if config.norm_weights:
        return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    return nn.RMSNorm(config.hidden_size, config.rms_norm_eps, elementwise_affine=False)


class UngatedLayer(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, vllm_config: Any, prefix: str = "", **kwargs: Any):
        super().__init__()
        config: UngatedConfig = vllm_config.model_config.hf_config
        quant = vllm_config.quant_config
        self.self_attn = UngatedAttention(
            config,
            int(prefix.rpartition(".")[2]),
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            quant_config=quant,
            bias=config.attention_bias,
            bias_o_proj=config.attention_bias,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp = UngatedMLP(config, quant, f"{prefix}.mlp")
        self.input_layernorm, self.post_attention_layernorm = _norm(config), _norm(config)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [N, D] -> (hidden_states, None): the residual of Llama's layers is folded in already."""
        attended = self.self_attn(positions, self.input_layernorm(hidden_states), token_ids)
        x = hidden_states + attended
        return x + self.mlp(self.post_attention_layernorm(x)), None


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0},
)
class UngatedModel(LlamaModel):
    """Llama's model with learned positions, and tokens for layers that embed them."""

    hf_to_vllm_mapper = MAPPER

    def __init__(self, *, vllm_config: Any, prefix: str = "", layer_type: type[nn.Module] = UngatedLayer):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        if self.config.learned_positions:
            self.embed_positions = nn.Embedding(self.config.max_position_embeddings, self.config.hidden_size)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """input_ids, positions [N] -> [N, D]."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        if self.config.learned_positions:  # a wave may guess beyond the last position
            last = self.config.max_position_embeddings - 1
            inputs_embeds = inputs_embeds + self.embed_positions(positions.clamp(max=last))
        given = {"token_ids": input_ids} if any(self.config.value_embeddings) else {}
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **given)


class UngatedForCausalLM(LlamaForCausalLM):
    """vLLM's Llama with ungated layers."""

    hf_to_vllm_mapper = MAPPER
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=UngatedLayer)

    def _init_model(self, vllm_config: Any, prefix: str = "", layer_type: type[nn.Module] = UngatedLayer):
        return UngatedModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)
