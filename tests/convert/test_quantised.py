"""Quantised sources: equal to transformers' own dequantised model, in each way that is read; one line for the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loopwise.convert import ConvertRecipe, convert
from loopwise.convert.quantisation import BitsAndBytes, CompressedTensors, Fp8
from loopwise.convert.quantised import Dequantised
from loopwise.recipe import validate
from tests.helpers.convert import change_fields, import_refused, refused, run
from tests.helpers.convert import source as golden
from tests.helpers.quantised import WAYS, dequantised, fp8
from tests.helpers.tiny import save_source

RECIPE = {"sizes": [1, 3, 2], "dequantize": True}


@pytest.mark.parametrize("way", WAYS)
def test_the_conversion_equals_transformers_dequantised_model(way, tmp_path):
    architecture, make = WAYS[way]
    source = save_source(tmp_path / "source", architecture)
    config = make(source)
    convert(source, tmp_path / "out", validate(ConvertRecipe, RECIPE))
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert got.dtype == torch.bfloat16
    want = dequantised(source, config)
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(want.float()(ids).logits, got.float()(ids, num_recurrences=1).logits)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())["source_config"]


def test_scales_under_the_name_of_autofp8(tmp_path):
    source = save_source(tmp_path / "source", "llama")
    want = dequantised(source, fp8(source, None))
    tensors = load_file(source / "model.safetensors")
    renamed = {name.replace("weight_scale_inv", "weight_scale"): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "out", validate(ConvertRecipe, RECIPE))
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(want.float()(ids).logits, got.float()(ids, num_recurrences=1).logits)


def test_refusals_name_the_key_and_the_method(tmp_path, capsys):
    source = save_source(tmp_path / "source", "llama")
    assert "not quantised" in refused(capsys, tmp_path, source, tmp_path / "out", "sizes=1,3,2", "dequantize=true")
    fp8(source)
    assert "dequantize=true" in refused(capsys, tmp_path, source, tmp_path / "out", "sizes=1,3,2")
    fields = json.loads((source / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (source / "config.json").write_text(json.dumps(fields))
    said = refused(capsys, tmp_path, source, tmp_path / "out", "sizes=1,3,2", "dequantize=true")
    assert "'gptq'" in said
    assert "mxfp4" in said


@pytest.mark.parametrize("kind", ["no scale", "a scale of another shape", "no scale at all", "a block of nothing"])
def test_parts_that_do_not_fit_are_one_line(kind, tmp_path, capsys):
    source = save_source(tmp_path / "source", "llama")
    fp8(source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    if kind == "no scale":
        del tensors[f"{name}_scale_inv"]
    else:
        shape = {"a scale of another shape": (7, 2), "no scale at all": (0, 2), "a block of nothing": (5, 2)}[kind]
        tensors[f"{name}_scale_inv"] = torch.ones(shape)
    if kind == "a block of nothing":
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"]["weight_block_size"] = [0, 0]
        (source / "config.json").write_text(json.dumps(config))
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert name in refused(capsys, tmp_path, source, tmp_path / "out", "sizes=1,3,2", "dequantize=true")


@pytest.mark.parametrize("rows", [80, 48])
def test_a_last_block_may_be_short(rows):
    """DeepSeek's kv_a_proj has 576 rows in blocks of 128: the last scale is that of 64. The count alone misleads: 48
    rows have 2 scales, the second of 16."""
    weight = torch.randn(rows, 64).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 32), 2)
    got = Fp8({"weight_block_size": [32, 32]}).value("x", {"weight": weight, "scale": scale})
    want = weight.float() * scale.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["ouro", "nanbeige"])
def test_recurrent_checkpoints_are_imported_with_the_same_key(name, tmp_path, capsys):
    folder = golden(name, tmp_path / "source")
    assert "is not quantised; leave it out" in import_refused(capsys, folder, tmp_path / "out", "dequantize=true")
    fp8(folder, None)
    line = import_refused(capsys, folder, tmp_path / "out")
    assert "is quantised (fp8): dequantize=true converts its values" in line
    got = run(folder, tmp_path / "out", dequantize=True)
    tensors = load_file(folder / "model.safetensors")
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
    for scale in tensors.keys() - plain.keys():
        weight = scale.removesuffix("_scale_inv")
        plain[weight] = (plain[weight].float() * tensors[scale]).bfloat16()
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    change_fields(folder, quantization_config=None)
    want = run(folder, tmp_path / "plain")
    assert got.dtype == want.dtype == torch.bfloat16
    assert got.state_dict().keys() == want.state_dict().keys()
    assert all(torch.equal(tensor, want.state_dict()[name]) for name, tensor in got.state_dict().items())


GROUPS = {
    "config_groups": {
        "a": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}},
        "b": {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}},
    },
    "format": "pack-quantized",
}


def test_the_most_specific_group_decides():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    values = torch.randint(-100, 100, (4, 8), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    parts = {
        "weight_packed": pack_to_int32(values, 8), "weight_scale": torch.full((4, 1), 0.5),
        "weight_shape": torch.tensor([4, 8]),
    }  # fmt: skip
    got = CompressedTensors(GROUPS).value("model.layers.0.mlp.down_proj.weight", parts)
    assert torch.equal(got, values * 0.5)


def test_a_weight_that_is_stored_as_it_is_keeps_its_values():
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    got = CompressedTensors(GROUPS).value(
        "a.up_proj.weight", {"weight": weight, "weight_scale": torch.full((4, 1), 0.5)}
    )
    assert torch.equal(got, weight)


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4", "int8"])
def test_bitsandbytes_own_values(kind):
    """A matrix as bitsandbytes 0.50.2 stores it, and what its own functions make of it."""
    file = Path(__file__).parent / "bitsandbytes.safetensors"
    with safe_open(file, framework="pt") as handle:
        read = Dequantised([handle], BitsAndBytes({}), torch.bfloat16)
        got, want = read.get_tensor(f"{kind}.weight"), handle.get_tensor(f"want.{kind}")
        assert torch.equal(got, want)
        assert read.get_slice(f"{kind}.weight").get_shape() == list(want.shape)
