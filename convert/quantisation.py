"""Ways of quantisation, each as the tensors that it stores and the values that these stand for."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import UserError, reason
from .dtypes import FROM_SAFETENSORS
from .handle import Handle

Parts = dict[str, torch.Tensor]  # the stored parts of one tensor, by the names that a method gives them
WEIGHT = "weight"


@dataclass
class Stored:
    """A part of a tensor as it is stored: its name in the file behind `handle`."""

    handle: Handle
    name: str

    @property
    def kind(self) -> str:
        return self.handle.get_slice(self.name).get_dtype()

    @property
    def shape(self) -> list[int]:
        return list(self.handle.get_slice(self.name).get_shape())

    def read(self) -> torch.Tensor:
        return self.handle.get_tensor(self.name)


class Method(ABC):
    """A way of quantisation, which `quant_method` of a config.json names.

    ends: endings of the names of stored parts -> the parts. The ending of the tensor itself, where its name is kept, is
        `.weight`. Parts that are not used map to "".
    """

    ends: ClassVar[dict[str, str]]

    def __init__(self, fields: dict[str, Any]):
        """fields: `quantization_config` of config.json."""
        self.fields = fields

    def tensor(self, name: str) -> tuple[str, str]:
        """(the tensor that the stored `name` is a part of, the part)."""
        end = next((end for end in self.ends if name.endswith(end)), None)
        return (f"{name.removesuffix(end)}.weight", self.ends[end]) if end else (name, WEIGHT)

    @abstractmethod
    def shape(self, parts: dict[str, Stored]) -> list[int]:
        """The shape of the tensor with these parts."""

    @abstractmethod
    def value(self, name: str, parts: Parts) -> torch.Tensor:
        """The tensor `name`, dequantised. Raises ValueError for parts that do not fit together."""


class Fp8(Method):
    """Float8 with a scale for each block or tensor (DeepSeek, Qwen, Mistral, AutoFP8), or fp4 in pairs; `mxfp8` has
    powers of two."""

    ends: ClassVar = {
        ".weight_scale_inv": "scale", ".weight_scale": "scale", ".scale": "scale", ".activation_scale": "",
        ".input_scale": "",
    }  # fmt: skip

    def tensor(self, name: str) -> tuple[str, str]:
        if name.endswith("_proj_scale_inv"):  # experts in one tensor
            return name.removesuffix("_scale_inv"), "scale"
        return super().tensor(name)

    def shape(self, parts: dict[str, Stored]) -> list[int]:
        *rows, width = parts[WEIGHT].shape
        return [*rows, 2 * width if parts[WEIGHT].kind == "I8" else width]

    def value(self, name: str, parts: Parts) -> torch.Tensor:
        packed, scale = parts[WEIGHT], parts["scale"]
        values = _fp4(packed) if packed.dtype == torch.int8 else packed.float()
        scale = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
        if scale.numel() == 1:
            return values * scale.reshape(())
        for axis in (-2, -1):
            scale = _repeated(scale, axis, values.shape[axis], self.fields.get("weight_block_size"))
        return values * scale


class Mxfp4(Method):
    """Fp4 with a power of two for each 32 values, as gpt-oss stores its experts."""

    ends: ClassVar = {"_blocks": "blocks", "_scales": "scales"}

    def tensor(self, name: str) -> tuple[str, str]:
        end = next((end for end in self.ends if name.endswith(f"_proj{end}")), None)
        return (name.removesuffix(end), self.ends[end]) if end else (name, WEIGHT)

    def shape(self, parts: dict[str, Stored]) -> list[int]:
        *before, rows, groups, size = parts["blocks"].shape
        return [*before, groups * size * 2, rows]

    def value(self, name: str, parts: Parts) -> torch.Tensor:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        return convert_moe_packed_tensors(parts["blocks"], parts["scales"])


class BitsAndBytes(Method):
    """bitsandbytes in 8 bits (a scale a row) and in 4 bits (nf4 and fp4, absmax a block, perhaps quantised too).

    The formulas are those of LLM.int8() (2208.07339) and QLoRA (2305.14314, section 3).
    """

    ends: ClassVar = {
        ".weight.nested_absmax": "nested_absmax", ".weight.nested_quant_map": "nested_map", ".weight.absmax": "absmax",
        ".weight.quant_map": "map", ".weight.quant_state.bitsandbytes__nf4": "state",
        ".weight.quant_state.bitsandbytes__fp4": "state", ".SCB": "rows", ".weight_format": "format",
    }  # fmt: skip

    def shape(self, parts: dict[str, Stored]) -> list[int]:
        return list(_state(parts["state"].read())["shape"]) if "state" in parts else parts[WEIGHT].shape

    def value(self, name: str, parts: Parts) -> torch.Tensor:
        if "format" in parts and parts["format"].item() != 0:
            raise ValueError("weight_format: only rows are read, not tiles for a GPU")
        if "rows" in parts:
            return parts[WEIGHT].float() * parts["rows"].view(-1, 1) * (1 / 127)
        state, packed, absmax = _state(parts["state"]), parts[WEIGHT].flatten(), parts["absmax"].float()
        if "nested_absmax" in parts:
            each = parts["nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(absmax)]
            absmax = parts["nested_map"][parts["absmax"].long()] * each + state["nested_offset"]
        values = parts["map"][torch.stack([packed >> 4, packed & 15], -1).long().flatten()]
        size = state["blocksize"]
        values = values[: torch.Size(state["shape"]).numel()] * absmax.repeat_interleave(size)[: len(values)]
        return values.view(state["shape"]).to(getattr(torch, state["dtype"]))


class CompressedTensors(Method):
    """The formats of the package compressed-tensors (llm-compressor's models), by the package itself."""

    ends: ClassVar = {
        **{f".weight_{part}": f"weight_{part}" for part in
           ("packed", "scale", "zero_point", "g_idx", "shape", "global_scale")},
        **{f".{kind}_{part}": "" for kind in ("input", "output", "k", "v", "q")
           for part in ("scale", "zero_point", "global_scale")},
    }  # fmt: skip

    def __init__(self, fields: dict[str, Any]):
        try:
            from compressed_tensors.quantization import QuantizationConfig
        except ImportError:
            raise UserError("compressed-tensors: install the package compressed-tensors to read it") from None
        known = {name: value for name, value in fields.items() if name in QuantizationConfig.model_fields}
        try:
            self.config = QuantizationConfig.model_validate(known)
        except ValueError as error:
            raise UserError(f"quantization_config: {reason(error)}") from None

    def shape(self, parts: dict[str, Stored]) -> list[int]:
        if "weight_shape" in parts:
            return parts["weight_shape"].read().tolist()
        if WEIGHT in parts:
            return parts[WEIGHT].shape
        rows, width = parts["weight_packed"].shape  # two fp4 a byte
        return [rows, 2 * width]

    def value(self, name: str, parts: Parts) -> torch.Tensor:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.format import infer_module_format
        from compressed_tensors.utils.match import match_targets

        if WEIGHT in parts and parts[WEIGHT].dtype in FROM_SAFETENSORS.values():  # calibrated, and not compressed
            return parts[WEIGHT]
        module, place = torch.nn.Linear(1, 1, device="meta"), name.removesuffix(".weight")
        groups: list[Any] = list(self.config.config_groups.values())
        schemes = {target: scheme for scheme in groups for target in scheme.targets}
        fitting = match_targets(place, module, schemes)  # the most specific first: a name, a pattern, a class
        if not fitting:
            raise ValueError("no group of quantization_config has it as a target")
        scheme = schemes[fitting[0]]
        kind = scheme.format or infer_module_format(torch.nn.Linear, scheme)
        compressor: Any = BaseCompressor.get_value_from_registry(str(getattr(kind, "value", kind)))
        return compressor.decompress(parts, scheme)[WEIGHT]


METHODS: dict[str, type[Method]] = {
    "fp8": Fp8, "mxfp8": Fp8, "mxfp4": Mxfp4, "bitsandbytes": BitsAndBytes, "compressed-tensors": CompressedTensors,
}  # fmt: skip


def _fp4(packed: torch.Tensor) -> torch.Tensor:
    """The fp4 (e2m1) values of `packed` [..., N], two a byte, the lower half first: [..., 2 N]."""
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    table = torch.cat([table, -table])
    bits = packed.view(torch.uint8)
    return table[torch.stack([bits & 15, bits >> 4], -1).long()].flatten(-2)


def _repeated(scale: torch.Tensor, axis: int, size: int, block: list[int] | None) -> torch.Tensor:
    """`scale` with each entry along `axis` as often as its block is long, cut to `size`.

    The block is the named one, whose last may be short; where its count is another (fp4 experts), it divides `size`.
    """
    count = scale.shape[axis]
    named = block[axis] if block else 0
    length = named if named > 0 and -(-size // named) == count else size // max(count, 1)
    if length * count < size or -(-size // max(length, 1)) != count:
        raise ValueError(f"{count} scales for {size} values")
    return scale.repeat_interleave(length, axis).narrow(axis, 0, size)


def _state(stored: torch.Tensor) -> dict[str, Any]:
    """The JSON object that bitsandbytes stores as bytes."""
    return json.loads(bytes(stored.tolist()))
