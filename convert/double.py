"""Computation in float64 of models that were written for less."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

GROUPED = {torch._grouped_mm, F.grouped_mm}  # pyright: ignore[reportPrivateUsage]
ROWS = 8192  # rows of a matrix that are converted to float64 at a time


class Double(TorchFunctionMode):
    """Within it each float32 that the code of transformers' models asks for, by name or by default, is float64.

    Their norms, rotary tables and softmax are computed in float32 whatever the dtype of the model. Changes torch's
    default dtype meanwhile.
    """

    on = True

    def __enter__(self) -> Double:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        torch.set_default_dtype(self.default)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
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
    def off(cls) -> Generator[None]:
        """Within it float32 is float32: weights are read and rounded as on writing."""
        before, cls.on = cls.on, False
        try:
            yield
        finally:
            cls.on = before


def _doubled(value: object) -> object:
    """float64 for the dtype float32; any other value unchanged."""
    return torch.float64 if value is torch.float32 else value


def _linear(rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Rows [.., in] in float64 times a matrix [out, in] of another dtype, ROWS of its rows at a time."""
    parts = [rows @ part.double().T for part in matrix.split(ROWS)]
    return torch.cat(parts, -1) + (0 if bias is None else bias)


def _grouped(
    rows: torch.Tensor, matrices: torch.Tensor, offs: torch.Tensor, bias: torch.Tensor | None = None, **_: object
) -> torch.Tensor:
    """Rows [N, K] times the matrix of their group, of matrices [G, K, M], plus its bias, of [G, M]: [N, M].

    Group g ends at row offs[g].
    """
    out = rows.new_zeros(len(rows), matrices.shape[2])
    ends = offs.tolist()
    for group, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        out[first:last] = rows[first:last] @ matrices[group] + (0 if bias is None else bias[group])
    return out
