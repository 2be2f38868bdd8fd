"""Open weight files: the methods of safetensors' `safe_open` that readers of weights use, and files on the hub."""

from __future__ import annotations

import json
from contextlib import ExitStack
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

PARTIAL = 206  # HTTP's status of a part of a file
LARGEST_HEADER = 100_000_000  # bytes that safetensors allows


class NoParts(UserError):
    """A hub that gives whole files alone."""


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

    Raises UserError for a file that the hub does not give, or that is damaged; NoParts for a hub that gives none.
    """

    def __init__(self, weights: HubWeights, name: str):
        self._place = weights.model, name, weights.commit
        self._tensors, self._values = _header(*self._place)

    def keys(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def get_slice(self, name: str) -> Slice:
        """The type and shape of tensor `name`."""
        return Shaped(self._tensors[name]["dtype"], list(self._tensors[name]["shape"]))

    def get_tensor(self, name: str) -> torch.Tensor:
        """The values of tensor `name`, by a request of its bytes."""
        tensor = self._tensors[name]
        start, end = tensor["data_offsets"]
        head = json.dumps({name: {**tensor, "data_offsets": [0, end - start]}}).encode()
        values = _part(*self._place, self._values + start, self._values + end) if end > start else b""
        return load(len(head).to_bytes(8, "little") + head + values)[name]


@cache
def _header(model: str, name: str, commit: str) -> tuple[dict[str, Any], int]:
    """The header's entries of the tensors in the file `name` on the hub, and the byte where their values begin."""
    size = int.from_bytes(_part(model, name, commit, 0, 8), "little")
    try:
        if size > LARGEST_HEADER:
            raise ValueError
        header = json.loads(_part(model, name, commit, 8, 8 + size))
        tensors = {tensor: header[tensor] for tensor in header.keys() - {"__metadata__"}}
        if not all({"dtype", "shape", "data_offsets"} <= entry.keys() for entry in tensors.values()):
            raise ValueError
    except (ValueError, AttributeError):
        raise UserError(f"{model}: {name} is damaged: it has no header of a safetensors file") from None
    return tensors, 8 + size


def _part(model: str, name: str, commit: str, start: int, end: int) -> bytes:
    """The bytes of the file `name` on the hub from `start` to before `end`."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url, headers = hf_hub_url(model, name, revision=commit), build_hf_headers()
    with (
        asking(lambda error: UserError(f"{model}: {name}: {why_not(error)}")),
        http_stream_backoff("GET", url, headers={**headers, "range": f"bytes={start}-{end - 1}"}) as reply,
    ):
        hf_raise_for_status(reply)
        if reply.status_code != PARTIAL:  # all of it would come
            raise NoParts(
                f"{model}: the hub gives no parts of {name}; download the model (hf download {model}), and give its "
                "directory"
            )
        content = reply.read()
        if len(content) != end - start:
            raise UserError(f"{model}: {name} is damaged: it ends before byte {end:,}")
        return content


def open_files(path: Path, stack: ExitStack, there: HubWeights | None = None) -> tuple[list[Path], list[Handle]]:
    """The weight files of the checkpoint in the directory `path`, and a handle of each, which `stack` closes.

    there: its weights on the hub, where `path` lacks them. Raises UserError for missing, truncated or pickled weights.
    """
    if there:
        return [path / name for name in there.names()], [HubFile(there, name) for name in there.names()]
    files = weight_files(path)
    return files, [stack.enter_context(safe_open(file, framework="pt")) for file in files]
