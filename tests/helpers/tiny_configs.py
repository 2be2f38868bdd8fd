"""Fields of a tiny config for each supported architecture: 6 layers, head size 32."""

from __future__ import annotations

from typing import Any

VOCAB = 320
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = {**_BASE, "num_key_value_heads": 1, "head_dim": 32}
_OLD = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 6,
    "n_head": 2,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_WINDOW = {**_GROUPED, "sliding_window": 8}  # shorter than the test inputs
_MOE = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MIXED = ["sliding_attention", "sliding_attention", "full_attention"] * 2
_LINEAR = ["linear_attention", "linear_attention", "full_attention"] * 2
_CONV = ["conv", "conv", "full_attention"] * 2
_DENSE_FIRST = ["dense", *["sparse"] * 5]
_DELTA = {
    **_GROUPED,
    "layer_types": _LINEAR,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA = {
    **_GROUPED,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
}
_ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
_LATENT = {
    **_BASE,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
# Fewer keys than tokens. Many heads: with few, several keys have the score 0, and the choice among them is chance.
_SPARSE = {**_LATENT, **_ROUTED, "mlp_layer_types": _DENSE_FIRST, "index_topk": 6, "index_head_dim": 16}
_SPARSE["index_n_heads"] = 16
_SWA_MOE = {**_WINDOW, "layer_types": _MIXED, "num_experts": 4, "num_experts_per_tok": 2}

# model_type -> config fields that make the architecture's own features bite: windows, mixed types, multipliers.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": {**_SWA_MOE, "moe_intermediate_size": 32, "num_dense_layers": 1, "num_shared_experts": 1},
    "apertus": _GROUPED,
    "arcee": _GROUPED,
    "aria_text": {**_GROUPED, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": {**_LATENT, **_ROUTED, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "axk2": _SPARSE,
    "bamba": {**_MAMBA, "attn_layer_indices": [2, 5]},
    "biogpt": _BASE,
    "bitnet": _GROUPED,
    "bloom": {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 6, "n_head": 2},
    "codegen": {**_OLD, "n_head": 4, "rotary_dim": 8},
    "cohere": {**_GROUPED, "logit_scale": 0.25},
    "cohere2": {**_WINDOW, "layer_types": _MIXED, "logit_scale": 0.25},
    "cohere2_moe": {**_SWA_MOE, "mlp_layer_types": _DENSE_FIRST, "logit_scale": 0.25},
    "cohere_compass_text": {
        **_WINDOW,
        "layer_types": _MIXED,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 6, 4]} for kind in _MIXED
        },
    },
    "ctrl": {**_OLD, "dff": 96},
    "cwm": {**_WINDOW, "layer_types": _MIXED},
    "deepseek_v2": {**_LATENT, **_ROUTED, "first_k_dense_replace": 1},
    "deepseek_v3": {**_LATENT, **_ROUTED, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "deepseek_v32": {**_SPARSE, "n_group": 2, "topk_group": 1},
    "doge": {**_BASE, "num_key_value_heads": 1},
    "dots1": {**_WINDOW, **_ROUTED, "first_k_dense_replace": 1, "layer_types": _MIXED},
    "ernie4_5": _GROUPED,
    "ernie4_5_moe": {
        **_BASE,
        "num_key_value_heads": 1,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
    },
    "exaone4": {**_WINDOW, "layer_types": _MIXED},
    "exaone_moe": {**_SWA_MOE, "moe_intermediate_size": 32, "mlp_layer_types": _DENSE_FIRST},
    "falcon": _BASE,
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5, "key_multiplier": 0.7},
    "flex_olmo": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma": _GROUPED,
    "gemma2": {**_WINDOW, "layer_types": _MIXED},
    "gemma3_text": {**_WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 24},
    "gemma4_text": {**_WINDOW, "layer_types": _MIXED, "global_head_dim": 64, "hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {**_WINDOW, "layer_types": _MIXED, "global_head_dim": 64},
    "glm": _GROUPED,
    "glm4": _GROUPED,
    "glm4_moe": {**_GROUPED, **_ROUTED, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**_LATENT, **_ROUTED, "mlp_layer_types": _DENSE_FIRST},
    "gpt2": _OLD,
    "gpt_bigcode": _OLD,
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_layers": 6,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 3]],
        "window_size": 8,
        "max_position_embeddings": 128,
    },
    "gpt_neox": _BASE,
    "gpt_neox_japanese": {**_BASE, "intermediate_multiple_size": 2},
    "gpt_oss": {**_WINDOW, "layer_types": _MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {**_OLD, "rotary_dim": 8},
    "granite": {
        **_GROUPED,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
    },
    "granite_swa": {**_WINDOW, "layer_types": _MIXED, "residual_multiplier": 0.5},
    "granitemoe": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.5},
    "granitemoe_swa": {
        **_WINDOW,
        "layer_types": _MIXED,
        "num_local_experts": 4,
        "shared_intermediate_size": 32,
        "residual_multiplier": 0.5,
    },
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": _LINEAR,
        "num_local_experts": 4,
        "shared_intermediate_size": 32,
        "residual_multiplier": 0.5,
        "position_embedding_type": "rope",
    },
    "granitemoeshared": {
        **_GROUPED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "residual_multiplier": 0.5,
    },
    "helium": _GROUPED,
    "hunyuan_v1_dense": _GROUPED,
    "hunyuan_v1_moe": {**_GROUPED, "num_experts": 4, "moe_topk": 2},
    "hy_v3": {**_MOE, "num_shared_experts": 1, "mlp_layer_types": _DENSE_FIRST},
    "hyperclovax": _GROUPED,
    "inkling_text": {
        **_GROUPED,
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"] * 2,
        "sliding_window_size": 8,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 32,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_layer_types": _DENSE_FIRST,
        "logits_mup_width_multiplier": 1.0,
    },
    "jais2": _GROUPED,
    "jamba": {
        **_GROUPED,
        "mamba_d_state": 16,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "expert_layer_period": 3,
        "expert_layer_offset": 1,
        "num_experts": 4,
    },
    "jetmoe": {**_BASE, "num_key_value_heads": 1, "kv_channels": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "kimi_linear": {
        **_LATENT,
        **_ROUTED,
        "layer_types": _LINEAR,
        "linear_head_dim": 16,
        "linear_num_heads": 2,
        "num_local_experts": 8,
        "mlp_layer_types": _DENSE_FIRST,
    },
    "laguna": {
        **_SWA_MOE,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "mlp_layer_types": _DENSE_FIRST,
    },
    "lfm2": {**_BASE, "num_key_value_heads": 1, "layer_types": _CONV, "block_multiple_of": 8},
    "lfm2_moe": {
        **_BASE,
        "num_key_value_heads": 1,
        "layer_types": _CONV,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_dense_layers": 1,
    },
    "llama": _GROUPED,
    "llama4_text": {
        **_GROUPED,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 1, 0] * 2,
        "attention_chunk_size": 8,
        "floor_scale": 4,
    },
    "mellum": {
        **_WINDOW,
        "layer_types": _MIXED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_layer_types": _DENSE_FIRST,
    },
    "mimo_v2_flash": {
        **_WINDOW,
        **_ROUTED,
        "v_head_dim": 16,
        "layer_types": _MIXED,
        "mlp_layer_types": _DENSE_FIRST,
    },
    "minicpm3": _LATENT,
    "minimax_m2": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "minimax_m3_vl_text": {
        **_GROUPED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 32,
        "rotary_dim": 16,
        "layer_types": ["minimax_m3_sparse", "minimax_m3_sparse", "full_attention"] * 2,
        "mlp_layer_types": _DENSE_FIRST,
        "index_n_heads": 1,
        "index_head_dim": 16,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {**_WINDOW, "layer_types": _MIXED},
    "ministral3": _GROUPED,
    "mistral": _WINDOW,
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "modernbert-decoder": {**_BASE, "layer_types": _MIXED, "local_attention": 16, "cls_token_id": 0, "sep_token_id": 1},
    "mpt": {"vocab_size": VOCAB, "d_model": 64, "n_layers": 6, "n_heads": 2, "max_seq_len": 128},
    "nanochat": _GROUPED,
    "nemotron": _GROUPED,
    "nemotron_h": {
        **_GROUPED,
        "layers_block_type": ["linear_attention", "mlp", "full_attention"] * 2,
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "olmo": {**_GROUPED, "clip_qkv": 3.0},
    "olmo2": _GROUPED,
    "olmo3": {**_WINDOW, "layer_types": _MIXED},
    "olmo_hybrid": {
        **_BASE,
        "num_key_value_heads": 2,
        "layer_types": _LINEAR,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "olmoe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**_BASE, "word_embed_proj_dim": 64, "ffn_dim": 96},
    "persimmon": _BASE,
    "phi": _BASE,
    "phi3": _GROUPED,
    "phimoe": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": _GROUPED,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "qwen3": _GROUPED,
    "qwen3_5_moe_text": {**_DELTA, **_MOE, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": _DELTA,
    "qwen3_moe": _MOE,
    "qwen3_next": {**_DELTA, **_MOE, "shared_expert_intermediate_size": 32, "mlp_only_layers": []},
    "seed_oss": _GROUPED,
    "smollm3": {**_GROUPED, "no_rope_layers": [1, 1, 0] * 2},
    "solar_open": {**_GROUPED, **_ROUTED},
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
    "vaultgemma": {**_WINDOW, "layer_types": _MIXED},
    "xglm": {
        "vocab_size": VOCAB,
        "d_model": 64,
        "ffn_dim": 96,
        "num_layers": 6,
        "attention_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 2,
    },
    "youtu": {**_LATENT, "pad_token_id": None},  # transformers zeroes the row of a pad token when it loads one
}

# Fields with which the layers of two loops are alike: without dense layers before those with experts.
UNIFORM: dict[str, dict[str, Any]] = {
    name: {field: value}
    for field, value, names in (
        ("num_dense_layers", 0, ["afmoe", "lfm2_moe"]),
        ("first_k_dense_replace", 0, ["axk1", "deepseek_v2", "deepseek_v3", "dots1", "glm4_moe"]),
        ("mlp_layer_types", ["sparse"] * 6, [name for name, own in ARCHITECTURES.items() if "mlp_layer_types" in own]),
        ("moe_layer_start_index", 0, ["ernie4_5_moe"]),
        ("interleave_moe_layer_step", 1, ["llama4_text"]),
        ("layer_types", ["full_attention"] * 6, ["modernbert-decoder"]),
    )
    for name in names
}

# Tried in the slow suite. Of their kinds, `make test` tries qwen3_5_text (linear attention), lfm2 (short convolutions),
# deepseek_v3 (latent attention, experts) and gemma4_text (layers of different sizes).
SLOW = set(
    """
afmoe apertus aria_text axk1 axk2 bamba bitnet cohere2_moe cohere_compass_text ctrl deepseek_v2 deepseek_v32 dots1
ernie4_5_moe exaone_moe falcon_h1 gemma4_unified_text glm4_moe glm4_moe_lite gpt_neox_japanese granite_swa
granitemoe_swa granitemoehybrid hunyuan_v1_moe hy_v3 hyperclovax inkling_text jamba jetmoe kimi_linear laguna lfm2_moe
llama4_text mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text modernbert-decoder nemotron_h olmo_hybrid
qwen3_5_moe_text qwen3_next solar_open youtu
""".split()  # noqa: SIM905 (a table)
)
