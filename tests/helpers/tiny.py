"""Tiny random source models, one for each supported architecture, and checkpoints of them on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

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

# model_type -> config fields that make the architecture's own features bite: windows, mixed types, multipliers.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "arcee": _GROUPED,
    "biogpt": _BASE,
    "bloom": {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 6, "n_head": 2},
    "codegen": {**_OLD, "n_head": 4, "rotary_dim": 8},
    "cohere": {**_GROUPED, "logit_scale": 0.25},
    "cohere2": {**_WINDOW, "layer_types": _MIXED, "logit_scale": 0.25},
    "cwm": {**_WINDOW, "layer_types": _MIXED},
    "doge": {**_BASE, "num_key_value_heads": 1},
    "ernie4_5": _GROUPED,
    "exaone4": {**_WINDOW, "layer_types": _MIXED},
    "falcon": _BASE,
    "flex_olmo": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma": _GROUPED,
    "gemma2": {**_WINDOW, "layer_types": _MIXED},
    "gemma3_text": {**_WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 24},
    "glm": _GROUPED,
    "glm4": _GROUPED,
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
    "gpt_oss": {**_WINDOW, "layer_types": _MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {**_OLD, "rotary_dim": 8},
    "granite": {
        **_GROUPED,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
    },
    "granitemoe": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.5},
    "granitemoeshared": {
        **_GROUPED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "residual_multiplier": 0.5,
    },
    "helium": _GROUPED,
    "hunyuan_v1_dense": _GROUPED,
    "jais2": _GROUPED,
    "llama": _GROUPED,
    "ministral": {**_WINDOW, "layer_types": _MIXED},
    "ministral3": _GROUPED,
    "mistral": _WINDOW,
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "mpt": {"vocab_size": VOCAB, "d_model": 64, "n_layers": 6, "n_heads": 2, "max_seq_len": 128},
    "nanochat": _GROUPED,
    "nemotron": _GROUPED,
    "olmo": {**_GROUPED, "clip_qkv": 3.0},
    "olmo2": _GROUPED,
    "olmo3": {**_WINDOW, "layer_types": _MIXED},
    "olmoe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**_BASE, "word_embed_proj_dim": 64, "ffn_dim": 96},
    "persimmon": _BASE,
    "phi": _BASE,
    "phi3": _GROUPED,
    "phimoe": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": _GROUPED,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "qwen3": _GROUPED,
    "qwen3_moe": _MOE,
    "seed_oss": _GROUPED,
    "smollm3": {**_GROUPED, "no_rope_layers": [1, 1, 0] * 2},
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
}


def source_config(model_type: str, **fields: Any) -> Any:
    """Config of a tiny model of that architecture: 6 layers, head size 32."""
    return AutoConfig.for_model(model_type, **{**ARCHITECTURES[model_type], **fields})


def attention(config: Any) -> str | None:
    """The implementation that computes the architecture: transformers' sdpa leaves out the cap on attention scores."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None


def load_source(directory: Path) -> Any:
    """The plain model of a checkpoint."""
    config = AutoConfig.from_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attention(config)).eval()


def source_model(model_type: str, seed: int = 0, **fields: Any) -> Any:
    """A tiny model in float32 with weights large enough that every layer matters."""
    torch.manual_seed(seed)
    config = source_config(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention(config)).float().eval()
    for parameter in model.parameters():
        std = 0.08 if parameter.dim() > 1 else 0.2
        mean = 0.0 if parameter.dim() > 1 else parameter.data.mean().item()
        torch.nn.init.normal_(parameter, mean=mean, std=std)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of VOCAB tokens with a chat template."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(["def f(x):\n    return x + 1\n", "the cat sat on the mat\n"] * 8, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    return fast


def save_source(directory: Path, model_type: str = "llama", seed: int = 0, shard: str = "5GB", **fields: Any) -> Path:
    """A tiny checkpoint with tokenizer, chat template and generation config in `directory`."""
    model = source_model(model_type, seed, **fields)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(directory, max_shard_size=shard)
    tokenizer().save_pretrained(directory)
    return directory
