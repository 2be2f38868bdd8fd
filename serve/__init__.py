"""Serving: the engine (`serve.engine`), offline use of it (`Engine`), and the vLLM plugin (`serve.vllm`)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .offline import Completion, Engine, Params

__all__ = ["Completion", "Engine", "Params"]


def __getattr__(name: str) -> Any:  # the command imports this package, and must not wait for torch
    if name in __all__:
        from . import offline

        return getattr(offline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
