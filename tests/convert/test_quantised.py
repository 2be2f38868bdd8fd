"""Quantised sources: equal to transformers' own dequantised model, in each way that is read; one line for the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config
from transformers.utils.quantization_config import Mxfp4Config

from loopwise.convert import ConvertRecipe, convert
from loopwise.convert.quantisation import BitsAndBytes, Fp8
from loopwise.convert.quantised import Dequantised
from loopwise.recipe import validate
from tests.helpers.convert import refused
from tests.helpers.tiny import save_source

LINEAR = re.compile(r"layers\.\d+\..*_proj\.weight$")
RECIPE = {"sizes": [1, 3, 2], "dequantize": True}


def stored(source: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors on disk of the checkpoint `source`, and its config.json."""
    return load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())


def write(source: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], quantised: dict[str, Any]) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, source / "model.safetensors", {"format": "pt"})
    fields = {**config, "dtype": "bfloat16", "quantization_config": quantised}
    (source / "config.json").write_text(json.dumps(fields))


def fp8(source: Path, block: Any = (32, 32)) -> FineGrainedFP8Config:
    """Float8 weights with a scale a block, as DeepSeek and Qwen publish them."""
    tensors, config = stored(source)
    for name in [name for name in tensors if LINEAR.search(name)]:
        weight = tensors[name].float()
        rows, columns = block or weight.shape
        tiles = weight.view(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
        scale = tiles.abs().amax((1, 3)) / 448
        tensors[name] = (tiles / scale[:, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale if block else scale.reshape(1)
    fields = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block and list(block)}
    write(source, tensors, config, fields)
    return FineGrainedFP8Config(dequantize=True, weight_block_size=block)


def mxfp4(source: Path) -> Mxfp4Config:
    """Experts in fp4 with a power of two for 32 values, as gpt-oss is published."""
    tensors, config = stored(source)
    draw = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if re.search(r"experts\.(gate_up|down)_proj$", name)]:
        experts, width, rows = tensors.pop(name).shape
        shape = (experts, rows, width // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=draw)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=draw)
    write(source, tensors, config, {"quant_method": "mxfp4"})
    return Mxfp4Config(dequantize=True)


def compressed(kind: str) -> Callable[[Path], CompressedTensorsConfig]:
    def make(source: Path) -> CompressedTensorsConfig:
        """Weights of llm-compressor's formats, written by the package."""
        from compressed_tensors.compressors import compress_module
        from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

        weights: Any = {
            "pack-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
            "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            "int-quantized": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
        }[kind]
        inputs: Any = None if kind == "pack-quantized" else {**weights, "strategy": "token", "dynamic": True}
        form: Any = kind
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=form)
        tensors, config = stored(source)
        for name in [name for name in tensors if LINEAR.search(name)]:
            weight = tensors.pop(name).to(torch.bfloat16)
            module: Any = torch.nn.Linear(*weight.shape[::-1], bias=False, dtype=torch.bfloat16)
            module.weight.data = weight
            groups = weight.unflatten(1, (-1, weights.get("group_size", weight.shape[1])))
            if weights["symmetric"]:
                scale = groups.abs().amax(-1) / (448 if weights["type"] == "float" else 127)
            else:
                low, high = groups.amin(-1), groups.amax(-1)
                scale = (high - low) / 15
                zero = (-8 - low / scale).round().clamp(-8, 7).to(torch.int8)
                module.weight_zero_point = torch.nn.Parameter(zero, requires_grad=False)
            module.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
            module.quantization_scheme = scheme
            compress_module(module)
            path = name.removesuffix("weight")
            tensors |= {f"{path}{part}": value.detach() for part, value in module.state_dict().items()}
        groups = {"config_groups": {"group_0": scheme}, "quantization_status": "compressed", "ignore": ["lm_head"]}
        fields = QuantizationConfig(**groups, format=kind).model_dump()
        write(source, tensors, config, {**fields, "quant_method": "compressed-tensors"})
        return CompressedTensorsConfig(**{**fields, "dequantize": True})

    return make


WAYS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "fp8": ("llama", fp8),
    "fp8 of a tensor": ("llama", lambda source: fp8(source, None)),
    "fp8 of experts": ("qwen3_moe", fp8),
    "mxfp4": ("gpt_oss", mxfp4),
    "packed int4": ("llama", compressed("pack-quantized")),
    "compressed fp8": ("llama", compressed("float-quantized")),
    "compressed int8": ("qwen2", compressed("int-quantized")),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_conversion_equals_transformers_dequantised_model(way, tmp_path):
    architecture, make = WAYS[way]
    source = save_source(tmp_path / "source", architecture)
    config = make(source)
    convert(source, tmp_path / "out", validate(ConvertRecipe, RECIPE))
    dequantised = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype="auto")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert got.dtype == dequantised.dtype == torch.bfloat16
    # The package compressed-tensors quantises activations in its own forward: its weights go into a plain model.
    plain: Any = AutoConfig.from_pretrained(source)
    del plain.quantization_config
    want = AutoModelForCausalLM.from_config(plain, attn_implementation=got.config._attn_implementation).eval()
    values = dequantised.state_dict()
    want.load_state_dict({name: values[name] for name in want.state_dict()})
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
    """A matrix as bitsandbytes stores it, and what it makes of it (golden/README.md)."""
    file = Path(__file__).parent / "golden" / "bitsandbytes" / "stored.safetensors"
    with safe_open(file, framework="pt") as handle:
        read = Dequantised([handle], BitsAndBytes({}), torch.bfloat16)
        got, want = read.get_tensor(f"{kind}.weight"), handle.get_tensor(f"want.{kind}")
        assert torch.equal(got, want)
        assert read.get_slice(f"{kind}.weight").get_shape() == list(want.shape)
