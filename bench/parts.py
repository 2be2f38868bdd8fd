"""Tensors that training changed, in small files beside the converted model, and the way back to the trained one.

A folder of parts has part-N.safetensors, each of at most so many MiB, and parts.json. A tensor that is larger than a
file is cut into rows: `NAME:START` begins at row START of it. Other files of the model that training wrote anew, as its
run.json, lie in model/.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loopwise.checkpoint import weight_files
from loopwise.errors import UserError

RECORD, BESIDE = "parts.json", "model"
MIB = 2**20
HEADER, ENTRY = 1024, 256  # bytes that a safetensors file needs beside its tensors, and beside each


def tensors(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all weights of a checkpoint, one after the other."""
    for file in weight_files(model):
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                yield name, opened.get_tensor(name)


def cut(converted: Path, trained: Path, folder: Path, dtype: torch.dtype, most: int) -> list[Path]:
    """Write what `trained` has other than `converted` into `folder`, which is made anew. Returns the parts.

    dtype: of the parts.   most: MiB of a part. Raises UserError for models with different tensors.
    """
    before = dict(tensors(converted))
    found: list[tuple[str, torch.Tensor]] = []
    for name, tensor in tensors(trained):
        if name not in before or before[name].shape != tensor.shape:
            raise UserError(f"{trained}: {name} is none of {converted}, from which it was to be trained")
        if not torch.equal(before[name], tensor):
            found += slices(name, tensor.to(dtype), most * MIB)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / BESIDE).mkdir(parents=True)
    _copy_small(converted, trained, folder / BESIDE)
    parts: list[dict[str, torch.Tensor]] = [{}]
    room = most * MIB - HEADER
    for name, tensor in found:
        if tensor.nbytes + ENTRY > room and parts[-1]:
            parts.append({})
            room = most * MIB - HEADER
        parts[-1][name] = tensor.contiguous()
        room -= tensor.nbytes + ENTRY
    files = [folder / f"part-{number}.safetensors" for number in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, file)
    record = {"base": _digest(before), "parts": {file.name: _sha256(file) for file in files}}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return files


def slices(name: str, tensor: torch.Tensor, most: int) -> list[tuple[str, torch.Tensor]]:
    """`tensor` whole, or as runs of rows that fit into files of `most` bytes."""
    room = most - HEADER - ENTRY
    if tensor.nbytes <= room:
        return [(f"{name}:0", tensor)]
    rows = max(1, room * len(tensor) // tensor.nbytes)
    return [(f"{name}:{start}", tensor[start : start + rows]) for start in range(0, len(tensor), rows)]


def join(converted: Path, folder: Path, out: Path) -> None:
    """Write the trained model into the new directory `out`: `converted`, with the parts of `folder` put in.

    Tensors have the dtype that they have in `converted`. Raises UserError for parts that are missing, damaged or of
    another model, and for an `out` that exists; nothing is written then.
    """
    if out.exists():
        raise UserError(f"{out} exists; name a new directory")
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder}: no {RECORD} in it; it is no folder of parts")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    weights = dict(tensors(converted))
    if record["base"] != _digest(weights):
        raise UserError(f"{converted} is not the model that {folder} was cut from: convert with the same command")
    for name, digest in record["parts"].items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise UserError(f"{folder / name}: missing, or other than what was cut")
    for name in record["parts"]:
        with safe_open(folder / name, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                whole, _, start = key.rpartition(":")
                rows, target = opened.get_tensor(key), weights[whole]
                if target.dim():
                    target = target[int(start) : int(start) + len(rows)]
                target.copy_(rows)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(converted, partial, ignore=shutil.ignore_patterns("*.safetensors*"))
    shutil.copytree(folder / BESIDE, partial, dirs_exist_ok=True)
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    partial.replace(out)


def _copy_small(converted: Path, trained: Path, target: Path) -> None:
    """Copy the files of `trained` that are no weights, and that `converted` has not or has otherwise."""
    for file in sorted(path for path in trained.iterdir() if path.is_file() and ".safetensors" not in path.name):
        other = converted / file.name
        if not other.is_file() or other.read_bytes() != file.read_bytes():
            shutil.copy2(file, target / file.name)


def _digest(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
