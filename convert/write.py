"""Writing a checkpoint: one tensor after another into safetensors shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import UserError
from .dtypes import TO_SAFETENSORS, dtype_name

SHARD_BYTES = 5 * 1000**3


@dataclass(frozen=True)
class Pending:
    """A tensor to write: name, type and shape are known, values are made when `make` is called.

    source: the names on disk that its values come from, for error lines; "" where there are none.
    """

    name: str
    dtype: torch.dtype
    shape: list[int]
    make: Callable[[], torch.Tensor]
    source: str = ""

    @property
    def bytes(self) -> int:
        """Size of the values on disk."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_weights(tensors: list[Pending], directory: Path, show_progress: bool, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `tensors` into `directory` as model.safetensors, or as numbered shards and an index.

    One tensor is in memory at a time. safetensors' own writer needs a whole shard; the format is a JSON header and the
    bytes in order. Raises UserError for values that are not finite in the type of the tensor.
    """
    shards: list[list[Pending]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    total = sum(t.bytes for t in tensors)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        where = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not show_progress) as progress:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(shard, directory / name, progress)


def _write_shard(tensors: list[Pending], path: Path, progress: tqdm[Any]) -> None:
    """Write one shard to `path`, and count its bytes in `progress`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        header[t.name] = {
            "dtype": TO_SAFETENSORS[t.dtype],
            "shape": t.shape,
            "data_offsets": [offset, offset + t.bytes],
        }
        offset += t.bytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # aligned to a cache line: some kernels round by alignment
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            made = t.make()
            values = made.to(t.dtype).contiguous()
            if not _is_finite(values):
                raise UserError(_why_not_finite(t, made))
            assert list(values.shape) == t.shape, f"{t.name}: {list(values.shape)} is not {t.shape}"
            file.write(values.flatten().view(torch.uint8).numpy().data)
            progress.update(t.bytes)


def _is_finite(values: torch.Tensor) -> bool:
    """True where all values are finite: the least and the greatest are."""
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())


def _why_not_finite(tensor: Pending, made: torch.Tensor) -> str:
    """The error line for values `made` that are not finite, or exceed the range of the type of `tensor`."""
    name = tensor.source or tensor.name
    if not _is_finite(made):
        return f"{name} has values that are not finite (NaN or infinity)"
    value = made.flatten()[made.abs().argmax()].item()
    wide = [
        f"dtype={dtype_name(kind)}"
        for kind in (torch.float16, torch.bfloat16, torch.float32)
        if kind != tensor.dtype and abs(value) <= torch.finfo(kind).max
    ]
    return (
        f"{name} has a value of {value:.6g}, and {dtype_name(tensor.dtype)} ends at "
        f"{torch.finfo(tensor.dtype).max:.6g}: "
        + (f"use {' or '.join(wide)}" if wide else "no type of a model holds it")
    )
