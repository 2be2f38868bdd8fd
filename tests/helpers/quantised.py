"""Quantised checkpoints of tiny models, as each kind is published, and transformers' config that dequantises them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config
from transformers.utils.quantization_config import Mxfp4Config

from tests.helpers.tiny import attention

LINEAR = re.compile(r"layers\.\d+\..*_proj\.weight$")


def stored(source: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors on disk of the checkpoint `source`, and its config.json."""
    return load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())


def write(source: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], quantised: dict[str, Any]) -> None:
    plain = {
        name: t.to(torch.bfloat16) for name, t in tensors.items() if t.dtype == torch.float32 and "_scale" not in name
    }
    stored = {name: t.contiguous() for name, t in (tensors | plain).items()}
    save_file(stored, source / "model.safetensors", {"format": "pt"})
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


def dequantised(source: Path, config: Any) -> Any:
    """The values of transformers' own dequantised model, in a plain one.

    The package compressed-tensors quantises activations in its model's forward, so that model is no oracle of logits.
    """
    fields: Any = AutoConfig.from_pretrained(source)
    del fields.quantization_config
    plain = AutoModelForCausalLM.from_config(fields, attn_implementation=attention(fields)).eval()
    values = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype="auto").state_dict()
    plain.load_state_dict({name: values[name] for name in plain.state_dict()})
    return plain
