"""Computation in float64 of models that were written for less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

GROUPED = {torch._grouped_mm, F.grouped_mm}
ROWS = 8192  # of a matrix that are taken to float64 at a time


class Double(TorchFunctionMode):
    """Within it, what transformers' models compute in float32 whatever their dtype (norms, rotary tables, softmax) is
    computed in float64: each float32 that their code asks for, by name or by default, becomes float64."""

    on = True

    def __enter__(self) -> Double:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        torch.set_default_dtype(self.default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.on:
            return func(*args, **kwargs)
        if func in GROUPED:  # torch has none in float64
            return _grouped(*args, **kwargs)
        if func is F.embedding:
            return func(*args, **kwargs).double()
        if func is F.linear and args[1].dtype != torch.float64:
            return _linear(*args, **kwargs)
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(_doubled, args), **{name: _doubled(value) for name, value in kwargs.items()})

    @classmethod
    @contextmanager
    def off(cls) -> Iterator[None]:
        """Within it float32 is float32, for weights that are read and rounded as they were written."""
        before, cls.on = cls.on, False
        try:
            yield
        finally:
            cls.on = before


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _linear(rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`rows` in float64 times a matrix [out, in] of another dtype, of which a part at a time is taken to float64."""
    parts = [rows @ part.double().T for part in matrix.split(ROWS)]
    return torch.cat(parts, -1) + (0 if bias is None else bias)


def _grouped(rows: torch.Tensor, matrices: torch.Tensor, offs: torch.Tensor, bias: Any = None, **_: Any):
    """Rows [N, K] times the matrix [K, M] of their group, of matrices [G, K, M], and its bias, of [G, M]. Group g ends
    at row offs[g]."""
    out = rows.new_zeros(len(rows), matrices.shape[2])
    ends = offs.tolist()
    for group, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        out[first:last] = rows[first:last] @ matrices[group] + (0 if bias is None else bias[group])
    return out
