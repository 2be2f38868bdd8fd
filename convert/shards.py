"""safetensors shards whose layout is known before any value: tensors are written in any order, by several processes."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .dtypes import TO_SAFETENSORS, dtype_name
from .pending import Pending

SHARD_BYTES = 5 * 1000**3
READ_BYTES = 1 << 24  # of a file at a time


@dataclass(frozen=True)
class Done:
    """A unit that is written: the CRC-32 of each of its tensors, and the error of its values where one is measured."""

    checksums: list[int]
    error: float | None


class Shards:
    """The weight files in `directory` that hold `tensors`: model.safetensors, or numbered shards and an index.

    safetensors' own writer needs a whole shard in memory; the format is a JSON header and the bytes in order.
    """

    def __init__(self, tensors: list[Pending], directory: Path, shard_bytes: int = SHARD_BYTES):
        self.directory, self.total = directory, sum(t.bytes for t in tensors)
        shards: list[list[Pending]] = [[]]
        size = 0
        for tensor in tensors:
            if shards[-1] and size + tensor.bytes > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += tensor.bytes
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        names = names if len(shards) > 1 else ["model.safetensors"]
        self._heads: dict[str, tuple[bytes, int]] = {}  # of each file: its header, and its size
        self._places: dict[str, tuple[Path, int]] = {}  # of each tensor: its file, and where its values begin there
        for name, shard in zip(names, shards, strict=True):
            head, end = _header(shard), 0
            for tensor in shard:
                self._places[tensor.name] = directory / name, len(head) + end
                end += tensor.bytes
            self._heads[name] = head, len(head) + end
        where = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": self.total}, "weight_map": where}
        self._index = json.dumps(index, indent=2) + "\n" if len(shards) > 1 else None

    @property
    def files(self) -> list[str]:
        """The names of the weight files."""
        return list(self._heads)

    @property
    def bytes(self) -> int:
        """The size of the weight files."""
        return sum(size for _, size in self._heads.values())

    def prepare(self) -> None:
        """Write index and headers; the values of a file that is there already stay as they are."""
        if self._index is not None:
            (self.directory / "model.safetensors.index.json").write_text(self._index, encoding="utf-8")
        for name, (head, size) in self._heads.items():
            with open(os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b") as file:
                file.write(head)
                file.truncate(size)

    def write(self, unit: list[Pending]) -> Done:
        """Make the tensors of `unit` and write their values. One is in memory at a time.

        Raises UserError for values that are not finite in the type of the tensor.
        """
        checksums: list[int] = []
        for tensor in unit:
            file, start = self._places[tensor.name]
            data = _values(tensor).flatten().view(torch.uint8).numpy().data
            with open(file, "r+b", buffering=0) as stream:
                stream.seek(start)
                while len(data):
                    data = data[stream.write(data) :]
            checksums.append(zlib.crc32(data.obj))
        return Done(checksums, unit[-1].error())

    def holds(self, unit: list[Pending], checksums: list[int]) -> bool:
        """True where the files hold values of these `checksums` for the tensors of `unit`."""
        for tensor, checksum in zip(unit, checksums, strict=True):
            file, start = self._places[tensor.name]
            with open(file, "rb", buffering=0) as stream:
                stream.seek(start)
                found, left = 0, tensor.bytes
                while left and (data := stream.read(min(left, READ_BYTES))):
                    found, left = zlib.crc32(data, found), left - len(data)
            if left or found != checksum:
                return False
        return True


def _header(tensors: list[Pending]) -> bytes:
    """The beginning of a safetensors file that holds the values of `tensors` in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
    return len(text).to_bytes(8, "little") + text


def _values(tensor: Pending) -> torch.Tensor:
    """The values of `tensor` in its type, on the CPU. Raises UserError for values that are not finite."""
    made = tensor.make()
    values = made.to(tensor.dtype).contiguous()
    if not _is_finite(values):
        raise UserError(_why_not_finite(tensor, made))
    assert list(values.shape) == tensor.shape, f"{tensor.name}: {list(values.shape)} is not {tensor.shape}"
    return values.cpu()


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
