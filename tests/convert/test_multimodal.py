"""The text model of a multimodal checkpoint: equal to the whole on text alone, with its tokenizer and template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopwise.convert import ConvertRecipe, convert
from loopwise.recipe import validate
from tests.helpers.convert import refused
from tests.helpers.multimodal import KINDS, load_whole, save_whole
from tests.helpers.tiny import VOCAB, tokenizer

FAST = ("gemma3", "mistral3", "qwen2_5_omni", "qwen3_vl_moe")


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_the_text_model_equals_the_whole_one_on_text(kind, tmp_path):
    source = save_whole(tmp_path / "source", kind)
    facts = convert(source, tmp_path / "out", validate(ConvertRecipe, {"sizes": [1, 2, 1]}))
    assert facts["max_dlogit"] == 0
    assert any("left out" in note and kind in note for note in facts["notes"])
    whole = load_whole(source, kind)
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


def with_tensor(source: Path, name: str) -> Path:
    """`source` with one more tensor."""
    file = source / "model.safetensors"
    save_file({**load_file(file), name: torch.arange(5)}, file, {"format": "pt"})
    return source


def test_an_unknown_tensor_of_a_part_that_is_left_out_is_left_out(tmp_path):
    """CLIP's positions, a buffer that older transformers stored."""
    name = "vision_tower.vision_model.embeddings.position_ids"
    source = with_tensor(save_whole(tmp_path / "source", "llava"), name)
    facts = convert(source, tmp_path / "out", validate(ConvertRecipe, {"sizes": [1, 2, 1]}))
    assert facts["max_dlogit"] == 0
    assert any(f"left out, as in transformers' llama: {name}" in note for note in facts["notes"])


@pytest.mark.parametrize("name", ["model.language_model.layers.1.more.weight", "language_model.model.more.weight"])
def test_an_unknown_tensor_of_the_text_model_is_refused(name, tmp_path, capsys):
    source = with_tensor(save_whole(tmp_path / "source", "llava"), name)
    assert f"{name} is not one of" in refused(capsys, tmp_path, source, tmp_path / "out", "sizes=1,2,1")


def test_a_model_without_a_text_decoder_is_refused(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert "text decoder" in refused(capsys, tmp_path, source, tmp_path / "out", "sizes=1,2,1")
