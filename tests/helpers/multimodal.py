"""Tiny random multimodal models, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from tests.helpers.tiny import VOCAB

TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN = {
    "depth": 1, "hidden_size": 32, "embed_dim": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64,
    "patch_size": 14, "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0],
}  # fmt: skip
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": 8}

# model_type -> (type of the text model, fields of text_config, the other fields)
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"sliding_window": 8}, {"vision_config": VISION, "mm_tokens_per_image": 4}),
    "mistral3": ("mistral", {"model_type": "mistral"},
                 {"vision_config": {**VISION, "head_dim": 16, "model_type": "pixtral"}, "tie_word_embeddings": False}),
    "qwen2_5_vl": ("qwen2", {"rope_parameters": SECTIONS}, {"vision_config": QWEN}),
    "qwen3_vl_moe": ("qwen3_moe", {"rope_parameters": {**SECTIONS, "mrope_interleaved": True}, **EXPERTS},
                     {"vision_config": QWEN}),
    "llava": ("llama", {"model_type": "llama"},
              {"vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}}),
    "qwen2_vl": ("qwen2", {"rope_parameters": SECTIONS}, {"vision_config": QWEN}),
    "qwen3_vl": ("qwen3", {"rope_parameters": {**SECTIONS, "mrope_interleaved": True}}, {"vision_config": QWEN}),
    "internvl": ("qwen2", {"model_type": "qwen2"},
                 {"vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]}}),
    "got_ocr2": ("qwen2", {"model_type": "qwen2"},
                 {"vision_config": {**VISION, "output_channels": 32, "global_attn_indexes": [0], "mlp_dim": 64}}),
    "smolvlm": ("llama", {"model_type": "llama"}, {"vision_config": VISION, "pad_token_id": 2}),
    "voxtral": ("llama", {"model_type": "llama"}, {"audio_config": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}}),
    "qwen2_5_omni": ("qwen2", {"rope_parameters": SECTIONS}, {
        "vision_config": QWEN, "audio_config": {**AUDIO, "output_dim": 64, "n_window": 4}, "vision_start_token_id": 3}),
    "qwen3_omni_moe_thinker": ("qwen3_moe", {"rope_parameters": {**SECTIONS, "mrope_interleaved": True}, **EXPERTS}, {
        "vision_config": QWEN, "audio_config": {**AUDIO, "output_dim": 64, "downsample_hidden_size": 8},
        "vision_start_token_id": 3}),
}  # fmt: skip


def whole_class(kind: str) -> Any:
    """transformers' class of the whole model."""
    return MODEL_FOR_MULTIMODAL_LM_MAPPING[CONFIG_MAPPING[kind]]


def save_whole(folder: Path, kind: str) -> Path:
    """A tiny random multimodal model, as transformers saves it."""
    _, text, rest = KINDS[kind]
    torch.manual_seed(0)
    made: Any = CONFIG_MAPPING[kind]
    fields: dict[str, Any] = {"text_config": {**TEXT, **text}, **rest}
    if kind == "qwen2_5_omni":
        fields = {"thinker_config": fields, "enable_audio_output": False}
    whole_class(kind)(made(**fields)).save_pretrained(folder)
    return folder


def load_whole(folder: Path, kind: str) -> Any:
    """The model of text and images in `folder`, in evaluation mode."""
    if kind == "qwen2_5_omni":  # its own loading asks for voices
        torch.save({}, folder / "spk_dict.pt")
        return whole_class(kind).from_pretrained(folder).thinker.eval()
    return whole_class(kind).from_pretrained(folder).eval()
