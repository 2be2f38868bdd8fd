"""Open weight files: the methods of safetensors' `safe_open` that readers of weights use."""

from __future__ import annotations

from typing import Protocol

import torch


class Slice(Protocol):
    """The type and shape of a stored tensor, without its values."""

    def get_dtype(self) -> str: ...

    def get_shape(self) -> list[int]: ...


class Handle(Protocol):
    """An open weight file; GgufTensors and Dequantised have these methods too."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> Slice: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...
