"""Tiny recurrent-depth models with random weights throughout, and token ids for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from tests.helpers.tiny import VOCAB, source_config

# Linear modules, and parameters of their own: plain, fused, transposed.
RELAXED_PARTS = {
    "llama": ({"self_attn.q_proj": 3, "mlp.down_proj": 5}, ["input_layernorm.weight", "self_attn.o_proj.weight"]),
    "gpt_neox": ({"attention.query_key_value": 4}, ["attention.dense.bias", "input_layernorm.weight"]),
    "gpt2": ({"attn.c_attn": 4, "mlp.c_proj": 2}, ["ln_1.bias", "mlp.c_fc.bias"]),
}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}


def build(model_type: str = "llama", **fields: Any) -> Any:
    """A tiny model with random weights throughout, the injection too."""
    defaults: dict[str, Any] = {
        "prelude": [0],
        "core": [2, 3],
        "coda": [5],
        "num_recurrences": 3,
        "injection": "linear",
    }
    torch.manual_seed(0)
    model = RecurrentDepthForCausalLM(
        RecurrentDepthConfig(source_config=source_config(model_type), **{**defaults, **fields})
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return model


def ids(batch: int = 2, length: int = 14) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


def embedded(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, Callable[[Any, torch.Tensor], torch.Tensor]]:
    """The embeddings [B, T, D] of tokens [B, T] in a model of a Llama, and a function that runs layers on states."""
    llama = model.source.model
    x = llama.embed_tokens(tokens)
    rotary = llama.rotary_emb(x, torch.arange(tokens.shape[1])[None])

    def run(layers: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = layer(x, attention_mask=None, position_embeddings=rotary)
        return x

    return x, run


def build_relaxed(model_type: str = "llama", depths: int = 2, dora: bool = False, **fields: Any) -> Any:
    """A tiny model with random weights throughout: prelude 0, core 1 and 2, coda 3."""
    rank, own = RELAXED_PARTS[model_type]
    defaults: dict[str, Any] = {"prelude": [0], "core": [1, 2], "coda": [3], "num_recurrences": 3}
    relaxation = {"depths": depths, "rank": rank, "own": own, "dora": dora}
    options = {**defaults, "relaxation": relaxation, **fields}
    model = RecurrentDepthForCausalLM(RecurrentDepthConfig(source_config=source_config(model_type), **options)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model
