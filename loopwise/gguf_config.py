"""The transformers config of a GGUF model, from the metadata of its file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .config_limits import check_values
from .errors import UserError, reason
from .gguf_header import Header, check_kind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Read = Callable[[str], list[float]]  # name of a tensor -> its values, flat

_COMMON = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_GPT2 = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_GEMMA = {"attention.key_length": "head_dim", "attention.sliding_window": "sliding_window"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}

# Architecture of the file -> model_type, required keys, optional keys. Mistral's files are llama's.
FAMILIES: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "llama": ("llama", _COMMON, {"rope.dimension_count": "head_dim", "attention.key_length": "head_dim"}),
    "qwen2": ("qwen2", _COMMON, {}),
    "qwen3": ("qwen3", _COMMON, {"attention.key_length": "head_dim"}),
    "gemma2": ("gemma2", {**_COMMON, **_GEMMA}, _CAPS),
    "gemma3": ("gemma3_text", {**_COMMON, **_GEMMA}, {**_CAPS, "rope.freq_base_swa": "rope_local_base_freq"}),
    "phi3": ("phi3", _COMMON, {"attention.sliding_window": "sliding_window"}),
    "gpt2": ("gpt2", _GPT2, {}),
}
# Further keys with numbers, of every architecture.
_NUMBERS = (
    "vocab_size", "attention.head_count_kv", "rope.freq_base", "rope.dimension_count", "rope.scaling.factor",
    "rope.scaling.original_context_length",
)  # fmt: skip
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def build_config(header: Header, read: Read) -> PreTrainedConfig:
    """The config of the model in the file of `header`; `read(name)` gives a tensor as a flat list of numbers.

    As transformers' reader builds it, with the fields that it leaves out: rotary scaling, and differences of single
    sizes of a family. Raises UserError for an architecture that is not supported, and for missing metadata.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    file, architecture = header.file, header.architecture
    if architecture not in FAMILIES:
        raise UserError(
            f"{file}: GGUF files of architecture {architecture!r} are not supported; supported are "
            f"{', '.join(FAMILIES)}. Take the safetensors of the model"
        )
    model_type, needed, optional = FAMILIES[architecture]
    if missing := [key for key in needed if header.value(key) is None]:
        raise UserError(f"{file}: its metadata lack {architecture}.{missing[0]}")
    _check_kinds(header, (*needed, *optional, *_NUMBERS))
    fields = {field: header.value(key) for key, field in needed.items()}
    fields |= {field: header.value(key) for key, field in optional.items() if header.value(key) is not None}
    fields |= {
        field: header.fields[f"tokenizer.ggml.{token}_token_id"]
        for token, field in _SPECIAL.items()
        if f"tokenizer.ggml.{token}_token_id" in header.fields
    }
    fields["vocab_size"] = header.value("vocab_size", header.fields.get("tokenizer.ggml.tokens"))
    fields["tie_word_embeddings"] = "output.weight" not in header.tensors
    if architecture != "gpt2":
        fields["num_key_value_heads"] = header.value("attention.head_count_kv", header.value("attention.head_count"))
        fields["rope_theta"] = header.value("rope.freq_base", 10000.0)
        fields |= _rotary_scaling(header, fields, read)
    if architecture in ("gemma2", "gemma3"):
        fields["query_pre_attn_scalar"] = _gemma_scale(header)
    if fields.get("sliding_window") == 0:
        fields["sliding_window"] = None
    check_values(fields, str(file))
    try:
        config = CONFIG_MAPPING[model_type](**fields)
    except Exception as error:  # transformers and huggingface_hub share no base class for errors in a config
        raise UserError(f"{file}: no {model_type} config can be made of its metadata ({reason(error)})") from None
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    config.dtype = "float32"
    return config


def _check_kinds(header: Header, numbers: tuple[str, ...]) -> None:
    """Raise UserError for metadata of another kind, as lists with a number for every layer: no model here has these."""
    for key in numbers:
        if (value := header.value(key)) is not None:
            check_kind(header.file, f"{header.architecture}.{key}", value, int, float)
    if (kind := header.value("rope.scaling.type")) is not None:
        check_kind(header.file, f"{header.architecture}.rope.scaling.type", kind, str)
    for key in ("attention.head_count", "rope.scaling.factor"):  # divisors
        if (value := header.value(key, 1)) <= 0:
            raise UserError(f"{header.file}: metadata {header.architecture}.{key} = {value}: more than 0")


def _gemma_scale(header: Header) -> float:
    """query_pre_attn_scalar, which files lack: a head's width, but in the 27B models hidden_size / heads.

    The 27B models are recognized by their number of layers, as in llama.cpp.
    """
    largest = {"gemma2": 46, "gemma3": 62}[header.architecture]
    if header.value("block_count") == largest:
        return header.value("embedding_length") // header.value("attention.head_count")
    return header.value("attention.key_length")


def _rotary_scaling(header: Header, fields: dict[str, Any], read: Read) -> dict[str, Any]:
    """The fields that scale rotary positions, which transformers' reader leaves out."""
    made: dict[str, Any] = {}
    width = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    rotary = header.value("rope.dimension_count", width)
    kind, factor = header.value("rope.scaling.type", "none"), header.value("rope.scaling.factor", 1.0)
    original = header.value("rope.scaling.original_context_length")
    if rotary != width:
        if header.architecture != "phi3":
            raise UserError(
                f"{header.file}: {header.architecture}.rope.dimension_count = {rotary} of a head's {width}: only phi3 "
                "models may rotate a part of it; take the safetensors of the model"
            )
        made["partial_rotary_factor"] = rotary / width
    long, short = ("rope_factors_long.weight" in header.tensors, "rope_factors_short.weight" in header.tensors)
    if "rope_freqs.weight" in header.tensors:
        scaling = _llama3(header, fields["rope_theta"], rotary, read("rope_freqs.weight"))
    elif long and short:
        scaling = {"rope_type": "longrope"}
        scaling |= {f"{end}_factor": read(f"rope_factors_{end}.weight") for end in ("long", "short")}
        made["original_max_position_embeddings"] = original or fields["max_position_embeddings"]
    elif kind == "none" or factor == 1.0:
        scaling = None
    elif kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": factor}
        if kind == "yarn" and original:
            scaling["original_max_position_embeddings"] = original
    else:
        raise UserError(f"{header.file}: rotary scaling of type {kind!r} is not supported; linear and yarn are")
    if scaling:
        made["rope_scaling"] = scaling
    return made


def _llama3(header: Header, theta: float, width: int, factors: list[float]) -> dict[str, Any] | None:
    """Llama 3.1's rotary scaling with these `factors` of the wavelengths, one for each of width / 2 frequencies.

    None where no wavelength is scaled. Raises UserError for factors of any other scaling.
    """
    scaling = {"factor": max(factors), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = 8192
    expected = []
    for pair in range(width // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / width)
        smooth = (original / wavelength - 1.0) / 3.0
        expected.append(1 / ((1 - min(max(smooth, 0.0), 1.0)) / scaling["factor"] + min(max(smooth, 0.0), 1.0)))
    if max(factors) == 1.0:
        return None
    if len(factors) != len(expected) or any(
        abs(found - wanted) > 1e-3 * wanted for found, wanted in zip(factors, expected, strict=True)
    ):
        raise UserError(
            f"{header.file}: its rope_freqs are not those of Llama 3.1's scaling (low 1, high 4, original length "
            "8192), the only one that is supported; take the safetensors of the model"
        )
    return {"rope_type": "llama3", **scaling, "original_max_position_embeddings": original}
