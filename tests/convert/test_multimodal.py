"""The text model of a multimodal checkpoint: equal to the whole on text alone, with its tokenizer and template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from loopwise.convert import ConvertRecipe, convert
from loopwise.recipe import validate
from tests.helpers.convert import refused
from tests.helpers.tiny import VOCAB, tokenizer

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
}  # fmt: skip
FAST = ("gemma3", "mistral3", "qwen3_vl_moe")


def whole_class(kind: str) -> Any:
    """transformers' class of the whole model."""
    return MODEL_FOR_MULTIMODAL_LM_MAPPING[CONFIG_MAPPING[kind]]


def save_whole(folder: Path, kind: str) -> Path:
    """A tiny random multimodal model, as transformers saves it."""
    _, text, rest = KINDS[kind]
    torch.manual_seed(0)
    made: Any = CONFIG_MAPPING[kind]
    config = made(text_config={**TEXT, **text}, **rest)
    whole_class(kind)(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_the_text_model_equals_the_whole_one_on_text(kind, tmp_path):
    source = save_whole(tmp_path / "source", kind)
    facts = convert(source, tmp_path / "out", validate(ConvertRecipe, {"sizes": [1, 2, 1]}))
    assert facts["max_dlogit"] == 0
    assert any("left out" in note and kind in note for note in facts["notes"])
    whole = whole_class(kind).from_pretrained(source).eval()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert got.config.source_config.model_type == KINDS[kind][0]
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.equal(want, got(ids, num_recurrences=1).logits)


def test_tokenizer_and_a_processors_template_come_along(tmp_path):
    """Older processors keep the template in a file of its own, which tokenizers do not read."""
    source = save_whole(tmp_path / "source", "mistral3")
    plain = tokenizer()
    plain.chat_template = None
    plain.save_pretrained(source)
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    (source / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    convert(source, tmp_path / "out", validate(ConvertRecipe, {"sizes": [1, 2, 1]}))
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert written.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"


def test_a_model_without_a_text_decoder_is_refused(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert "text decoder" in refused(capsys, tmp_path, source, tmp_path / "out", "sizes=1,2,1")
