"""Tensors that are still to be made, and the units in which they are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


def _unmeasured() -> float | None:
    """The error of a tensor that has none."""
    return None


@dataclass(frozen=True)
class Pending:
    """A tensor to write: name, type and shape are known, values are made when `make` is called.

    source: the names on disk that its values come from, for error lines; "" where there are none.
    group: tensors of one group share the making of their values, so one process makes them; "" for a tensor by itself.
    error: the error of the group's values once they are made; None where nothing is measured.
    """

    name: str
    dtype: torch.dtype
    shape: list[int]
    make: Callable[[], torch.Tensor]
    source: str = ""
    group: str = ""
    error: Callable[[], float | None] = _unmeasured

    @property
    def bytes(self) -> int:
        """Size of the values on disk."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def units(tensors: list[Pending]) -> list[list[Pending]]:
    """`tensors` in units of work: those of one group together, every other one by itself."""
    found: dict[tuple[str, str], list[Pending]] = {}
    for tensor in tensors:
        found.setdefault((tensor.group, "" if tensor.group else tensor.name), []).append(tensor)
    return list(found.values())
