"""A checkpoint by the names of its tensors on disk, and what an import makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..checkpoint import weight_files
from ..errors import UserError
from .source import DTYPES

Transform = Callable[..., torch.Tensor]


class RawTensors:
    """The tensors of a checkpoint by their names on disk. Use as a context manager."""

    def __init__(self, path: Path):
        self.files = weight_files(path)
        self._stack = ExitStack()
        handles = [self._stack.enter_context(safe_open(file, framework="pt")) for file in self.files]
        self._where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    def __enter__(self) -> RawTensors:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        return set(self._where)

    def read(self, name: str) -> torch.Tensor:
        return self._where[name].get_tensor(name)

    def shape(self, name: str) -> list[int]:
        return list(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        kind = self._where[name].get_slice(name).get_dtype()
        if kind not in DTYPES:
            raise UserError(f"{name} has type {kind}; convert the model to {', '.join(DTYPES)} first")
        return DTYPES[kind]


@dataclass
class Imported:
    """What a checkpoint becomes. `fields` are those of RecurrentDepthConfig, `tensors` maps the name of a tensor of the
    output to the tensors on disk that it comes from (one, mostly), and to what is done with them."""

    fields: dict[str, Any]
    tensors: dict[str, tuple[list[str], Transform]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)  # tensors on disk that the model computes, or has already

    def copy(self, name: str, raw: str) -> None:
        self.tensors[name] = ([raw], lambda tensor: tensor)

    def rows(self, name: str, raw: str, parts: Sequence[int], which: int, order: torch.Tensor | None = None) -> None:
        """Part `which` of a matrix whose rows are fused of `parts`, so many each; its rows in the given order."""

        def take(tensor: torch.Tensor) -> torch.Tensor:
            if len(tensor) != sum(parts):
                raise UserError(f"{raw} has {len(tensor)} rows; the config says {' + '.join(map(str, parts))}")
            part = tensor.split(list(parts))[which]
            return part if order is None else part[order]

        self.tensors[name] = ([raw], take)
