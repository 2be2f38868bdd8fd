"""The tensors of a checkpoint by their names on disk."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from ..errors import UserError
from ..find_source import HubWeights
from .dtypes import FROM_SAFETENSORS
from .handle import open_files
from .quantisation import Method
from .quantised import Dequantised


class RawTensors:
    """The safetensors files of the checkpoint in the directory `path`, memory-mapped. Use as a context manager.

    there: its weights on the hub, where `path` lacks them.   method: the way in which the files are quantised; their
    values are of `dtype` then. Raises UserError for missing, truncated or pickled weights (see `weight_files`).
    """

    def __init__(
        self,
        path: Path,
        there: HubWeights | None = None,
        method: Method | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ):
        self._stack = ExitStack()
        self.files, handles = open_files(path, self._stack, there)
        if method:
            handles = [Dequantised(handles, method, dtype)]
        self._handles = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    def __enter__(self) -> RawTensors:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._handles)

    def read(self, name: str) -> torch.Tensor:
        """The values of tensor `name`, in its stored type."""
        return self._handles[name].get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """The shape of tensor `name`; no values are read."""
        return list(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The type of tensor `name`. Raises UserError for a type that is not floating-point."""
        kind = self._handles[name].get_slice(name).get_dtype()
        if kind not in FROM_SAFETENSORS:
            raise UserError(f"{name} has type {kind}; convert the model to {', '.join(FROM_SAFETENSORS)} first")
        return FROM_SAFETENSORS[kind]
