"""An exported checkpoint is a plain model of the source architecture with the same logits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopwise.cli import main
from loopwise.convert import ConvertRecipe, convert
from loopwise.convert.export import export
from loopwise.recipe import validate
from tests.helpers.convert import EVERY_LAYER, tokens
from tests.helpers.tiny import save_source


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        *((name, {}) for name in ("llama", "gemma3_text", "gpt_neox", "gpt_neo", "smollm3")),
        ("qwen3_moe", {"mlp_only_layers": [0, 2]}),  # dense layers among the mixtures of experts
        ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": list(range(6))}),
        ("qwen2_moe", {"decoder_sparse_step": 3}),
    ],
)
def test_logits_are_equal_bit_for_bit(model_type, fields, tmp_path):
    source = save_source(tmp_path / "source", model_type, **fields)
    convert(source, tmp_path / "model", validate(ConvertRecipe, EVERY_LAYER))
    assert export(tmp_path / "model", tmp_path / "plain", unroll=3) == {"float32": 0}
    model, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("model", "plain"))
    assert plain.config.model_type == model_type
    assert plain.config.num_hidden_layers == 12
    with torch.no_grad():
        seen = tokens()["attention_mask"].bool()
        assert torch.equal(plain(**tokens()).logits[seen], model(**tokens(), num_recurrences=3).logits[seen])
    text = "def f(x): return"
    ids = [AutoTokenizer.from_pretrained(tmp_path / name)(text).input_ids for name in ("source", "plain")]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("sharing", ["cycle", "sequence"])
def test_lora_and_sharing_are_written_out(model_type, sharing, tmp_path):
    keys = {"method": "recursive", "loops": 2, "sharing": sharing, "lora": {"rank": 8, "targets": ["q", "o"]}}
    convert(save_source(tmp_path / "source", model_type), tmp_path / "model", validate(ConvertRecipe, keys))
    differs = export(tmp_path / "model", tmp_path / "plain", unroll=3)
    assert differs is not None
    assert differs["float64"] < 1e-5
    model, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("model", "plain"))
    with torch.no_grad():
        seen = tokens()["attention_mask"].bool()
        want, got = model(**tokens(), num_recurrences=3).logits[seen], plain(**tokens()).logits[seen]
        assert (want - got).abs().max() < 1e-4


def test_what_cannot_be_exported_is_refused(capsys, tmp_path):
    save_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "model", validate(ConvertRecipe, {"sizes": [1, 2, 1]}))
    for argv, said in (
        (["model", "out", "--unroll", "2"], "injection='linear'"),
        (["source", "out", "--unroll", "2"], "not 'recurrent_depth'"),
        (["none", "out", "--unroll", "2"], "no such directory"),
        (["model", "out"], "--unroll"),
        (["model", "out", "--unroll", "0"], "--unroll 0"),
        (["model", "out", "--unroll", "99999999999"], "from 1 to 4096"),
    ):
        assert main(["export", str(tmp_path / argv[0]), str(tmp_path / argv[1]), *argv[2:]]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
