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
from loopwise.convert.quantisation import BitsAndBytes, Fp8
from loopwise.convert.quantised import Dequantised
from loopwise.recipe import validate
from tests.helpers.convert import refused
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


@pytest.mark.parametrize("kind", ["no scale", "a scale of another shape"])
def test_parts_that_do_not_fit_are_one_line(kind, tmp_path, capsys):
    source = save_source(tmp_path / "source", "llama")
    fp8(source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    if kind == "no scale":
        del tensors[f"{name}_scale_inv"]
    else:
        tensors[f"{name}_scale_inv"] = torch.ones(7, 2)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert name in refused(capsys, tmp_path, source, tmp_path / "out", "sizes=1,3,2", "dequantize=true")


def test_rows_that_no_block_divides(tmp_path):
    """DeepSeek's kv_a_proj has 576 rows in blocks of 128: the last scale is that of 64."""
    weight = torch.randn(80, 64).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2)
    got = Fp8({"weight_block_size": [32, 32]}).value("x", {"weight": weight, "scale": scale})
    want = weight.float() * scale.repeat_interleave(32, 0)[:80].repeat_interleave(32, 1)
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4", "int8"])
def test_bitsandbytes_own_values(kind):
    """A matrix as bitsandbytes 0.50.2 stores it, and what its own functions make of it."""
    file = Path(__file__).parent / "bitsandbytes.safetensors"
    with safe_open(file, framework="pt") as handle:
        read = Dequantised([handle], BitsAndBytes({}), torch.bfloat16)
        got, want = read.get_tensor(f"{kind}.weight"), handle.get_tensor(f"want.{kind}")
        assert torch.equal(got, want)
        assert read.get_slice(f"{kind}.weight").get_shape() == list(want.shape)
