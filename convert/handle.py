"""Open weight files: the methods of safetensors' `safe_open` that readers of weights use, and files on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load

from ..checkpoint import weight_files
from ..errors import UserError
from ..find_source import HubWeights
from ..hub import asking, why_not


class Slice(Protocol):
    """The type and shape of a stored tensor, without its values."""

    def get_dtype(self) -> str: ...

    def get_shape(self) -> list[int]: ...


class Handle(Protocol):
    """An open weight file; GgufTensors, Dequantised and HubFile have these methods too."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> Slice: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


@dataclass
class Shaped:
    """The type and shape of a tensor."""

    kind: str
    shape: list[int]

    def get_dtype(self) -> str:
        return self.kind

    def get_shape(self) -> list[int]:
        return self.shape


class HubFile:
    """The safetensors file `name` of a model on the hub: its header is read now, each tensor when it is asked for.

    Raises UserError for a file that the hub does not give, or that is damaged.
    """

    def __init__(self, weights: HubWeights, name: str):
        self._weights, self._name = weights, name
        with self._asking():
            self._tensors = _header(weights.model, name, weights.commit)
        self._values: int | None = None  # the byte at which they begin

    def keys(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def get_slice(self, name: str) -> Slice:
        """The type and shape of tensor `name`."""
        return Shaped(self._tensors[name].dtype, list(self._tensors[name].shape))

    def get_tensor(self, name: str) -> torch.Tensor:
        """The values of tensor `name`, by a request of its bytes."""
        if self._values is None:
            self._values = 8 + int.from_bytes(self._bytes(0, 8), "little")
        tensor = self._tensors[name]
        start, end = tensor.data_offsets
        entry = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [0, end - start]}
        head = json.dumps({name: entry}).encode()
        values = self._bytes(self._values + start, self._values + end) if end > start else b""
        return load(len(head).to_bytes(8, "little") + head + values)[name]

    def _bytes(self, start: int, end: int) -> bytes:
        """The bytes of the file from `start` to before `end`."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        url = hf_hub_url(self._weights.model, self._name, revision=self._weights.commit)
        with self._asking():
            reply = http_backoff("GET", url, headers={**build_hf_headers(), "range": f"bytes={start}-{end - 1}"})
            hf_raise_for_status(reply)
            if len(reply.content) != end - start:
                raise UserError(f"{self._weights.model}: the hub gives no part of {self._name}")
        return reply.content

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with asking(lambda error: UserError(f"{self._weights.model}: {self._name}: {why_not(error)}")):
            yield


@cache
def _header(model: str, name: str, commit: str) -> dict[str, Any]:
    """The tensors of the file `name` on the hub, in the form of its client. Raises its errors."""
    from huggingface_hub import HfApi

    return dict(HfApi().parse_safetensors_file_metadata(model, name, revision=commit).tensors)


def open_files(path: Path, stack: ExitStack, there: HubWeights | None = None) -> tuple[list[Path], list[Handle]]:
    """The weight files of the checkpoint in the directory `path`, and a handle of each, which `stack` closes.

    there: its weights on the hub, where `path` lacks them. Raises UserError for missing, truncated or pickled weights.
    """
    if there:
        return [path / name for name in there.names()], [HubFile(there, name) for name in there.names()]
    files = weight_files(path)
    return files, [stack.enter_context(safe_open(file, framework="pt")) for file in files]
