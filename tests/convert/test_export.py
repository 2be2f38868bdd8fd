"""An exported checkpoint is a plain model of the source architecture with the same logits."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopwise.cli import main
from loopwise.convert import ConvertRecipe, convert
from loopwise.convert.export import export
from loopwise.convert.pending import Pending
from loopwise.convert.published import published
from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.model.configuration_sandwich import SandwichConfig
from loopwise.recipe import validate
from loopwise.train.pretrained import cast
from tests.helpers.convert import EVERY_LAYER, tokens
from tests.helpers.tiny import save_source, source_model
from tests.helpers.tiny_configs import ARCHITECTURES


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


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_names_and_pieces_are_those_that_transformers_saves(model_type, tmp_path):
    model = source_model(model_type)
    model.save_pretrained(tmp_path)
    want = load_file(tmp_path / "model.safetensors")
    state = {name: x for name, x in model.state_dict().items() if name not in model.all_tied_weights_keys}
    pending = [Pending(name, x.dtype, list(x.shape), partial(torch.clone, x)) for name, x in state.items()]
    found = published(model, pending)
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in found} == {
        name: (tensor.dtype, list(tensor.shape)) for name, tensor in want.items()
    }
    for tensor in found:
        assert torch.equal(tensor.make(), want[tensor.name]), tensor.name


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


def test_tensors_that_stay_in_float32(tmp_path):
    """The bias of a router of experts, a buffer that differs by layer: it is not rounded, and a LoRA leaves it tied."""
    torch.manual_seed(0)
    source = source_model("glm4_moe")
    biases = {name: torch.randn_like(x) for name, x in source.named_buffers() if name.endswith("correction_bias")}
    assert len(biases) > 1
    source.to(torch.bfloat16)
    for name, values in biases.items():
        source.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = values
    source.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "model", validate(ConvertRecipe, EVERY_LAYER))
    export(tmp_path / "model", tmp_path / "plain", unroll=1)
    found = load_file(tmp_path / "plain" / "model.safetensors")
    for name, values in biases.items():
        assert torch.equal(found[name], values)
    assert found["model.layers.1.input_layernorm.weight"].dtype == torch.bfloat16
    keys = {"method": "recursive", "loops": 2, "sharing": "middle-cycle", "lora": {"rank": 4}}
    assert convert(tmp_path / "source", tmp_path / "relaxed", validate(ConvertRecipe, keys)) is not None
    relaxation = json.loads((tmp_path / "relaxed" / "config.json").read_text())["relaxation"]
    assert not any("correction_bias" in name for name in relaxation["own"])
    state = {"a.e_score_correction_bias": torch.ones(1), "b": torch.ones(1)}
    assert [x.dtype for x in cast(state, "bfloat16", {"e_score_correction_bias"}).values()] == [
        torch.float32,
        torch.bfloat16,
    ]


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


@pytest.mark.parametrize("policy", ["first", "single", "modulo-2"])
def test_recurrences_that_share_keys_are_no_plain_layers(policy, capsys, tmp_path):
    keys = {"method": "recursive", "loops": 2, "kv_policy": policy}
    convert(save_source(tmp_path / "source"), tmp_path / "model", validate(ConvertRecipe, keys))
    argv = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--unroll"]
    assert main([*argv, "2"]) == 2
    assert f"kv_policy='{policy}': recurrences share keys and values" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*argv, "1"]) == 0


def test_layers_that_transformers_lacks_are_refused(capsys, tmp_path):
    """Ouro's, for one: a plain model of them would load nowhere."""
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    source = SandwichConfig(**sizes, num_hidden_layers=2)
    config = RecurrentDepthConfig(source_config=source, core=[0, 1], injection="none")
    RecurrentDepthForCausalLM(config).save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--unroll", "1"]) == 2
    error = capsys.readouterr().err
    assert "has sandwich layers, and transformers has no such model, so it cannot be exported; `loopwise" in error
    assert not (tmp_path / "out").exists()
