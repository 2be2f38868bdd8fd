"""Quantised tensors of a checkpoint, dequantised one at a time, so that the files read as those of a plain model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, reason, shorten
from .dtypes import FROM_SAFETENSORS, TO_SAFETENSORS, dtype_name
from .handle import Handle, Shaped, Slice
from .quantisation import METHODS, WEIGHT, Method, Stored


def quantisation(fields: dict[str, Any]) -> dict[str, Any] | None:
    """`quantization_config` of the fields of a config.json, of the model or of its text model; None for a plain one."""
    inside = fields.get("text_config")
    found = fields.get("quantization_config") or (
        inside.get("quantization_config") if isinstance(inside, dict) else None
    )
    return found if isinstance(found, dict) else None


def find_method(fields: dict[str, Any], path: Path, dequantize: bool) -> Method | None:
    """The way in which the checkpoint in the directory `path` is quantised; None for a plain one.

    fields: of its config.json. Raises UserError for a quantised one without `dequantize`, for a plain one with it, and
    for methods that are not read.
    """
    found = quantisation(fields)
    if found is None:
        if dequantize:
            raise UserError(f"dequantize=true: {path} is not quantised; leave it out")
        return None
    name = found.get("quant_method") or ("bitsandbytes" if found.keys() & {"load_in_4bit", "load_in_8bit"} else None)
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(
            f"{path} is quantised ({shorten(repr(name), 60)}); convert the unquantised checkpoint. Of quantised ones, "
            f"{', '.join(METHODS)} and GGUF files are read"
        )
    if not dequantize:
        raise UserError(
            f"{path} is quantised ({name}): dequantize=true converts its values, in the model's own type; or convert "
            "the unquantised checkpoint"
        )
    return METHODS[name](found)


class Dequantised:
    """The tensors of several weight files, `handles`, by the methods of one handle; quantised ones in `dtype`."""

    def __init__(self, handles: Sequence[Handle], method: Method, dtype: torch.dtype):
        self._method, self._dtype = method, dtype
        self._parts: dict[str, dict[str, Stored]] = {}
        for handle in handles:
            for raw in handle.keys():  # noqa: SIM118
                name, part = method.tensor(raw)
                if part:
                    self._parts.setdefault(name, {})[part] = Stored(handle, raw)

    def keys(self) -> list[str]:
        """The names of all tensors."""
        return list(self._parts)

    def get_slice(self, name: str) -> Slice:
        """The type and shape of tensor `name`, dequantised."""
        parts = self._parts[name]
        if parts.keys() == {WEIGHT}:
            return parts[WEIGHT].handle.get_slice(parts[WEIGHT].name)
        try:
            return Shaped(TO_SAFETENSORS[self._dtype], self._method.shape(parts))
        except Exception as error:  # of files whose parts do not fit; packages assert them
            raise _broken(name, parts, error) from None

    def get_tensor(self, name: str) -> torch.Tensor:
        """The values of tensor `name`. Raises UserError for parts that do not make it up."""
        parts = self._parts[name]
        if parts.keys() == {WEIGHT}:
            return parts[WEIGHT].read()
        try:
            return self._method.value(name, {part: stored.read() for part, stored in parts.items()}).to(self._dtype)
        except Exception as error:
            raise _broken(name, parts, error) from None


def dtype_of(config: Any) -> torch.dtype:
    """The type of the values of a quantised model of `config`; bfloat16 where it has none of those that are written."""
    dtype: Any = getattr(config, "dtype", None)
    return dtype if dtype in FROM_SAFETENSORS.values() else torch.bfloat16


def dtype_in(fields: dict[str, Any]) -> torch.dtype:
    """`dtype_of` a config.json with these fields, of a model that transformers has no config of."""
    name = str(fields.get("dtype") or fields.get("torch_dtype")).removeprefix("torch.")
    return {dtype_name(dtype): dtype for dtype in TO_SAFETENSORS}.get(name, torch.bfloat16)


def _broken(name: str, parts: dict[str, Stored], error: Exception) -> UserError:
    stored = ", ".join(f"{part.name} {part.kind} {part.shape}" for part in parts.values())
    return UserError(f"{name} cannot be dequantised from {stored} ({type(error).__name__}: {reason(error)})")
