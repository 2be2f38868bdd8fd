"""The three lists of source architectures, and what is said of those that are not supported."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import is_timm_available

from loopwise.cli import main
from loopwise.convert.architectures import CANNOT, MULTIMODAL, NOT_YET, SUPPORTED, check_fields, check_supported
from loopwise.convert.source_config import empty_model
from loopwise.convert.text_model import find_text_model, is_multimodal, text_config, whole_model
from loopwise.errors import UserError
from tests.helpers.convert import EVERY_LAYER, change_fields, refused, run, tokens
from tests.helpers.tiny import load_source, save_source

# Fields without which the default config of a type builds no model in transformers, or one that is refused.
FIELDS: dict[str, Any] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [24, 20, 20]}}}},
    "gemma4": {"text_config": {"hidden_size_per_layer_input": 0}},
    "idefics3": {"pad_token_id": 2},
    "qwen3_omni_moe": {"talker_config": {
        "spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 768}}},
    "smolvlm": {"pad_token_id": 2},
}  # fmt: skip
FAST = ("fuyu", "qwen2_5_omni")
OF_TIMM = ("fast_vlm", "perception_lm")  # their vision part is built by the package timm


def test_every_language_model_of_transformers_is_in_one_list():
    """The causal ones, and the multimodal ones that make text."""
    lists = [*SUPPORTED, *MULTIMODAL, *NOT_YET, *CANNOT]
    known = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    assert sorted(lists) == sorted(known)  # sorted lists: none is in two


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in MULTIMODAL])
def test_the_text_model_inside_of_a_multimodal_one_is_found_and_supported(kind):
    config = CONFIG_MAPPING[kind](**FIELDS.get(kind, {}))
    assert is_multimodal(config)
    if kind in OF_TIMM and not is_timm_available():
        with pytest.raises(UserError, match="timm"):
            whole_model(config)
        return
    whole = whole_model(config)
    text = text_config(whole)
    check_supported(text.model_type)
    check_fields(text, kind)
    with torch.device("meta"):
        text_model = empty_model(text)
    found = set(find_text_model(whole, text_model).names.values())
    assert found >= text_model.state_dict().keys() - text_model.all_tied_weights_keys.keys()


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("zamba2", "'zamba2' is not supported yet: several of its layers share one transformer block"),
        ("diffllama", "'diffllama' cannot be converted: its attention depends on a layer's place"),
        ("glm4v", "'glm4v' is not supported yet: its text model has no causal class"),
        ("paligemma", "'paligemma' cannot be converted: tokens of its prompt"),
        ("t5", "'t5' is not supported; supported are afmoe, "),
    ],
)
def test_the_reason_is_said(model_type, said, capsys, tmp_path):
    path = save_source(tmp_path / "source")
    change_fields(path, model_type=model_type)
    line = refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")
    assert said in line
    assert ("qwen3" in line) == (model_type == "t5")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers=2 lets the last 2 layers read keys and values of"),
        ({"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input=8 gives each layer a part of every token's"),
    ],
)
def test_fields_over_a_boundary_are_refused(fields, said, capsys, tmp_path):
    path = save_source(tmp_path / "source", "gemma4_text")
    change_fields(path, **fields)
    assert said in refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("llama", {"is_causal": False}),
        ("llama", {"is_causal": None}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("gemma4_text", {"use_bidirectional_attention": "all"}),
    ],
)
def test_attention_to_later_tokens_is_refused(architecture, fields, capsys, tmp_path):
    path = save_source(tmp_path / "source", architecture)
    change_fields(path, **fields)
    line = refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")
    [(name, value)] = fields.items()
    assert f"{name}={value} lets a token attend to later ones" in line


def test_an_order_that_a_plain_model_lacks_is_refused(capsys, tmp_path):
    """The core of this Jamba is no whole number of periods; in that of DeepSeek, a dense layer comes after experts."""
    path = save_source(tmp_path / "jamba", "jamba")
    line = refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,2", "injection=none")
    assert "attn_layer_period=3, expert_layer_period=3: kinds of a plain model's layers repeat by these" in line
    path = save_source(tmp_path / "deepseek", "deepseek_v3")
    line = refused(capsys, tmp_path, path, tmp_path / "out", "layers.prelude=1", "layers.core=0,2", "layers.coda=5")
    assert "first_k_dense_replace: a plain model has its layers without experts at its ends" in line


@pytest.mark.parametrize(
    ("architecture", "fields", "name"),
    [
        ("qwen3_5_text", {}, "mtp.fc.weight"),
        ("deepseek_v3", {"num_nextn_predict_layers": 1}, "model.layers.6.eh_proj.weight"),
        ("glm4_moe", {"num_nextn_predict_layers": 2}, "model.layers.7.input_layernorm.weight"),
    ],
)
def test_heads_that_predict_further_tokens_are_left_out_and_named(architecture, fields, name, capsys, tmp_path):
    path = save_source(tmp_path / "source", architecture)
    change_fields(path, **fields)
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, name: torch.ones(2, 2)}, path / "model.safetensors", {"format": "pt"})
    model = run(path, tmp_path / "out", **EVERY_LAYER)
    facts = json.loads((tmp_path / "out" / "loopwise.json").read_text())
    assert any(f"left out, as in transformers' {architecture}: {name}" in note for note in facts["notes"])
    with torch.no_grad():
        want, got = load_source(path)(**tokens()).logits, model(**tokens(), num_recurrences=1).logits
    seen = tokens()["attention_mask"].bool()
    assert torch.equal(want[seen], got[seen])


def test_a_layer_after_those_that_predict_is_refused(capsys, tmp_path):
    path = save_source(tmp_path / "source", "deepseek_v3")
    change_fields(path, num_nextn_predict_layers=1)
    tensors, name = load_file(path / "model.safetensors"), "model.layers.7.eh_proj.weight"
    save_file({**tensors, name: torch.ones(2, 2)}, path / "model.safetensors", {"format": "pt"})
    assert f"tensor {name} is not one of" in refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,3,2")


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.cos_cached"),
        ("llama", "model.layers.0.self_attn.rotary_emb.sin_cached"),
        ("codegen", "transformer.h.0.attn.causal_mask"),
    ],
)
def test_tables_that_older_transformers_stored_are_read_over(architecture, name, tmp_path):
    path = save_source(tmp_path / "source", architecture)
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, name: torch.ones(4, dtype=torch.bool)}, path / "model.safetensors", {"format": "pt"})
    assert main(["convert", str(path), str(tmp_path / "out"), "sizes=1,3,2", "--dry-run"]) == 0


@pytest.mark.parametrize("architecture", ["granite_swa", "granitemoe_swa"])
def test_one_layer_beside_one_rotary_table(architecture, tmp_path):
    path = save_source(tmp_path / "source", architecture, num_hidden_layers=1, layer_types=["full_attention"])
    model = run(path, tmp_path / "out", method="retrofit", sizes=[0, 1, 0], injection="none")
    with torch.no_grad():
        want, got = load_source(path)(**tokens(False)).logits, model(**tokens(False), num_recurrences=1).logits
    assert torch.equal(want, got)
