"""Surgery on checkpoints: `convert(source, out, recipe)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .recipe import ConvertRecipe

if TYPE_CHECKING:
    from .surgery import convert

__all__ = ["ConvertRecipe", "convert"]


def __getattr__(name: str):
    if name == "convert":
        from .surgery import convert

        return convert
    raise AttributeError(f"module 'loopwise.convert' has no attribute {name!r}")
