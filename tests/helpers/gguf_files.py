"""GGUF files of tiny models, written as llama.cpp's converter writes them: its names, layouts, metadata, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize

from tests.helpers.tiny import VOCAB, source_model, tokenizer

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
_HEADS = {"num_key_value_heads": 1, "head_dim": 32}
_GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "layer_types": None}

# Name of the test -> architecture in the file, model_type, fields that a file can tell, tokenizer.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("llama", "llama", {**_HEADS, "tie_word_embeddings": True}, "gpt2"),
    "llama with a head": ("llama", "llama", {**_HEADS, "tie_word_embeddings": False}, "llama"),
    "mistral": ("llama", "mistral", {**_HEADS, "sliding_window": None}, "llama"),
    "qwen2": ("qwen2", "qwen2", {"num_key_value_heads": 1}, "gpt2"),
    "qwen3": ("qwen3", "qwen3", {"num_key_value_heads": 1, "head_dim": 128, "tie_word_embeddings": True}, "gpt2"),
    "gemma2": ("gemma2", "gemma2", _GEMMA, "llama"),
    "gemma3": ("gemma3", "gemma3_text", {**_GEMMA, "sliding_window": 8}, "llama"),
    "phi3": ("phi3", "phi3", {}, "llama"),
    "gpt2": ("gpt2", "gpt2", {"n_positions": 1024}, "gpt2"),
}
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
}
_MODERN = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "feed_forward_length": "intermediate_size",
}


def family_model(family: str, **fields: Any) -> Any:
    """The tiny transformers model of a family, with the tokens' ids of its tokenizer."""
    _, model_type, own, _ = FAMILIES[family]
    return source_model(model_type, **{**own, **fields})


def write_gguf(
    file: Path,
    model: Any,
    family: str = "llama",
    kinds: str | list[str] = "F32",
    metadata: dict[str, Any] | None = None,
    names: dict[int, str] | None = None,
) -> Path:
    """Write `model` to `file`. Matrices are of the types `kinds`, in turn; vectors of F32. `metadata` is added; `names`
    replaces tokens, by their ids, by control tokens of other names."""
    architecture, _, _, vocabulary = FAMILIES[family]
    writer, tokens = GGUFWriter(file, architecture), _vocabulary(vocabulary)
    for token, name in (names or {}).items():
        tokens["tokenizer.ggml.tokens"][token], tokens["tokenizer.ggml.token_type"][token] = name, 3
    for key, value in {**_metadata(architecture, model), **tokens, **(metadata or {})}.items():
        _add(writer, key, value)
    kinds = [kinds] if isinstance(kinds, str) else kinds
    matrices = 0
    for name, values in _tensors(architecture, model).items():
        kind = GGMLQuantizationType.F32
        if values.ndim > 1:
            kind = GGMLQuantizationType[kinds[matrices % len(kinds)]]
            matrices += 1
        writer.add_tensor(name, _stored(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _stored(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    try:
        return quantize(values, kind)
    except NotImplementedError:  # only dequantised in Python: any bytes will do that make no half-float infinite
        from gguf import GGML_QUANT_SIZES

        elements, size = GGML_QUANT_SIZES[kind]
        shape = (*values.shape[:-1], values.shape[-1] // elements * size)
        return np.random.default_rng(values.size).integers(0, 48, shape, dtype=np.uint8)


def _metadata(architecture: str, model: Any) -> dict[str, Any]:
    config = model.config
    fields = {key: getattr(config, name) for key, name in _KEYS.items()}
    if architecture == "gpt2":
        fields |= {"feed_forward_length": 4 * config.n_embd, "attention.layer_norm_epsilon": config.layer_norm_epsilon}
    else:
        fields |= {key: getattr(config, name) for key, name in _MODERN.items()}
        rope = config.rope_parameters
        fields["rope.freq_base"] = rope.get("full_attention", rope)["rope_theta"]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        fields |= {"rope.dimension_count": width, "attention.key_length": width}
    if architecture in ("gemma2", "gemma3"):
        fields["attention.sliding_window"] = config.sliding_window
    return {f"{architecture}.{key}": value for key, value in fields.items()}


def _tensors(architecture: str, model: Any) -> dict[str, np.ndarray]:
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names, config = get_tensor_name_map(arch, model.config.num_hidden_layers), model.config
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        path, _, kind = name.rpartition(".")
        values = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if architecture == "gpt2" and path.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc") and kind == "weight":
            values = np.ascontiguousarray(values.T)
        found[f"{names.get_name(path)}.{kind}"] = np.ascontiguousarray(values)
    return found


def _vocabulary(kind: str) -> dict[str, Any]:
    """A byte-level vocabulary with merges (gpt2), or SentencePiece's with bytes and scores (llama); VOCAB tokens."""
    if kind == "gpt2":
        content = json.loads(tokenizer().backend_tokenizer.to_str())
        tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
        extra = {"merges": [" ".join(pair) for pair in content["model"]["merges"]], "pre": "qwen2"}
        types = [3 if token in ("<s>", "</s>", "<pad>") else 1 for token in tokens]
        tokens += [f"[PAD{n}]" for n in range(len(tokens), VOCAB)]
    else:
        pieces = [
            "▁",
            *"theca sonmdfx(:)+1",
            "▁t",
            "▁th",
            "▁the",
            "at",
            "▁c",
            "▁cat",
            "on",
            "▁on",
            "in",
            "er",
            "re",
            "▁s",
        ]
        pieces = [*dict.fromkeys(pieces)]
        tokens = ["<s>", "</s>", "<pad>", "<unk>", *(f"<0x{n:02X}>" for n in range(256)), *pieces]
        tokens += [f"<unused{n}>" for n in range(VOCAB - len(tokens))]
        types = [3, 3, 3, 2, *[6] * 256, *[1] * len(pieces)]
        extra = {"scores": [float(-n) for n in range(VOCAB)], "unknown_token_id": 3, "add_space_prefix": False}
        extra["add_bos_token"] = False
    types += [5] * (VOCAB - len(types))  # unused
    ids = {"bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 2}
    fields = {"model": kind, "tokens": tokens, "token_type": types, **extra, **ids}
    return {"tokenizer.chat_template": CHAT, **{f"tokenizer.ggml.{key}": value for key, value in fields.items()}}


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)
