"""Floating-point types of weights, by the names that safetensors and recipes give them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

FROM_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TO_SAFETENSORS = {dtype: name for name, dtype in FROM_SAFETENSORS.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name in torch and in recipes: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def named_dtype(name: str | None) -> torch.dtype | None:
    """The type of that name in torch and in recipes; None for None, the type that is stored."""
    return None if name is None else getattr(torch, name)


def common_dtype(tensors: Iterable[tuple[torch.dtype, list[int]]]) -> torch.dtype:
    """The type of most parameters among tensors of these types and shapes."""
    sizes: dict[torch.dtype, int] = {}
    for dtype, shape in tensors:
        sizes[dtype] = sizes.get(dtype, 0) + torch.Size(shape).numel()
    return max(sizes, key=lambda dtype: sizes[dtype])
