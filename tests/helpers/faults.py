"""Faults that verification is to find: in the written checkpoint, and in the code that writes and runs it.

Each is a context manager that is called with the directory of a checkpoint and makes the fault while it is open. Sizes
are the smallest that are stated to be caught.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from loopwise.model import relaxation

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def places(directory: Path) -> tuple[dict[str, Any], int]:
    """The header of the safetensors file in `directory`, and where its tensors begin."""
    with open(directory / "model.safetensors", "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def read(directory: Path, name: str) -> torch.Tensor:
    """A tensor of the checkpoint, in memory of its own."""
    header, start = places(directory)
    first, last = header[name]["data_offsets"]
    with open(directory / "model.safetensors", "rb") as file:
        file.seek(start + first)
        data = bytearray(file.read(last - first))
    return torch.frombuffer(data, dtype=TYPES[header[name]["dtype"]]).view(header[name]["shape"])


def put(directory: Path, name: str, tensor: torch.Tensor) -> None:
    """Write a tensor of the checkpoint over the one that it has."""
    header, start = places(directory)
    before = read(directory, name)
    assert tensor.shape == before.shape
    assert not torch.equal(tensor, before), f"nothing changes in {name}"
    with open(directory / "model.safetensors", "r+b") as file:
        file.seek(start + header[name]["data_offsets"][0])
        file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


@contextmanager
def changed(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within it tensor `name` of the checkpoint holds what `change` makes of it; after it, what it held before."""
    before = read(directory, name)
    put(directory, name, change(before.clone()))
    try:
        yield
    finally:
        put(directory, name, before)


@contextmanager
def swapped(directory: Path, one: str, two: str) -> Iterator[None]:
    """Within it two tensors of the checkpoint are swapped."""
    first, second = read(directory, one), read(directory, two)
    with changed(directory, one, lambda _: second), changed(directory, two, lambda _: first):
        yield


@contextmanager
def configured(directory: Path, change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Within it config.json has the fields that `change` makes of it."""
    file = directory / "config.json"
    before = file.read_text()
    fields = json.loads(before)
    change(fields)
    file.write_text(json.dumps(fields))
    assert file.read_text() != before
    try:
        yield
    finally:
        file.write_text(before)


def one_more(tensor: torch.Tensor) -> torch.Tensor:
    """One value in the middle becomes the next that the dtype has: the smallest change there is."""
    flat = tensor.flatten()
    middle = len(flat) // 2
    flat[middle] = torch.nextafter(flat[middle], torch.tensor(torch.inf, dtype=flat.dtype))
    return flat.view(tensor.shape)


def scaled(by: float, depth: int = 1) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[depth] *= 1 + by
        return tensor

    return change


def added(by: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 0, 0] += by
        return tensor

    return change


def rows_swapped(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[:-2], tensor[-1:], tensor[-2:-1]])


def theta(by: float) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        fields["source_config"]["rope_parameters"]["rope_theta"] *= 1 + by

    return change


def with_values(section: str | None = None, **values: Any) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        (fields[section] if section else fields).update(values)

    return change


def eps(by: float) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        fields["source_config"]["rms_norm_eps"] *= 1 + by

    return change


def patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[Path], Any]:
    """A fault of the code: `owner.name` is what `make` makes of it."""
    return lambda directory: mock.patch.object(owner, name, make(getattr(owner, name)))


def scale_at_one_depth(by: float) -> Callable[[Any], Any]:
    """LoRA of the second depth are multiplied by 1 + `by`."""

    def make(forward: Any) -> Any:
        def wrong(self: Any, depth: int, device: torch.device) -> dict[str, torch.Tensor]:
            right = forward(self, depth, device)
            return {**right, "lora_B": right["lora_B"] * (1 + by)} if depth == 1 else right

        return wrong

    return make


def rounded_in_float32(run: Any) -> Any:
    """LoRA pass through bfloat16 where the model computes in float32, and there alone."""

    def wrong(self: Any, linear: Any, x: torch.Tensor) -> torch.Tensor:
        right, out = run(self, linear, x), type(linear).forward(linear, x)
        return right if out.dtype == torch.float64 else out + (right - out).bfloat16().to(out.dtype)

    return wrong


def next_depth(run: Any) -> Any:
    """A layer takes the parameters of the depth after its own."""

    def wrong(self: Any, layer: Any, x: torch.Tensor, *args: Any, depth: int, **kwargs: Any) -> Any:
        return run(self, layer, x, *args, depth=1 - depth, **kwargs)

    return wrong


Q = "self_attn.q_proj"
# Name -> fault, for a recursive model with LoRA in float32 whose tied layers are averaged.
FAULTS: dict[str, Callable[[Path], Any]] = {
    "lora_B of one matrix at one depth, by 1e-4": lambda d: changed(d, f"relaxation.0.{Q}.lora_B", scaled(1e-4)),
    "lora_A of one matrix at one depth, by 1e-5": lambda d: changed(d, f"relaxation.0.{Q}.lora_A", scaled(1e-5)),
    "one value of lora_A, by 1e-3": lambda d: changed(d, f"relaxation.1.{Q}.lora_A", added(1e-3)),
    "one value of lora_B, by 1e-3": lambda d: changed(d, f"relaxation.1.{Q}.lora_B", added(1e-3)),
    "lora_A of another depth": lambda d: changed(d, f"relaxation.1.{Q}.lora_A", lambda t: t.flip(0)),
    "LoRA of another layer": lambda d: swapped(d, f"relaxation.0.{Q}.lora_B", f"relaxation.1.{Q}.lora_B"),
    "norms of another depth": lambda d: changed(d, "relaxation.0.input_layernorm.weight", lambda t: t.flip(0)),
    "one value of a norm": lambda d: changed(d, "relaxation.1.post_attention_layernorm.weight", one_more),
    "matrices of two layers swapped": lambda d: swapped(d, "core.0.mlp.up_proj.weight", "core.1.mlp.up_proj.weight"),
    "a square matrix transposed": lambda d: changed(d, "core.1.self_attn.o_proj.weight", lambda t: t.T),
    "one value of a matrix": lambda d: changed(d, "core.2.mlp.down_proj.weight", one_more),
    "one value of the embeddings": lambda d: changed(d, "source.model.embed_tokens.weight", one_more),
    "two rows of the embeddings swapped": lambda d: changed(d, "source.model.embed_tokens.weight", rows_swapped),
    "one value of the final norm": lambda d: changed(d, "source.model.norm.weight", one_more),
    "rope_theta, by 1e-7": lambda d: configured(d, theta(1e-7)),
    "rms_norm_eps, by 1e-3": lambda d: configured(d, eps(1e-3)),
    "a window that no sample fills": lambda d: configured(d, with_values("source_config", sliding_window=64)),
    "the depth of requests": lambda d: configured(d, with_values(num_recurrences=3)),
    "the greatest depth": lambda d: configured(d, with_values(max_recurrences=9)),
    "the dtype": lambda d: configured(d, with_values(dtype="bfloat16")),
    "the token that ends a text": lambda d: configured(d, with_values(eos_token_id=5)),
    "the scale of LoRA at one depth, by 1e-8": patched(relaxation.Factors, "forward", scale_at_one_depth(1e-8)),
    "LoRA rounded in float32 alone": patched(relaxation.Factors, "_run", rounded_in_float32),
    "parameters of another depth": patched(relaxation.Relaxation, "_run", next_depth),
}
