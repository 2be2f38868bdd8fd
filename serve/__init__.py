"""Serving: offline (`Engine`), and as vLLM's OpenAI server (`loopwise serve`).

In reading order; a file imports only from files above it:

    engine/          the depth-wise engine: lanes at mixed depths through one core
    api/             requests and models as every engine sees them
    memory.py        keys and values in bytes, compared with the memory that is free
    completeness.py  tensors of a checkpoint, counted off against those of its model
    checkpoint.py    a checkpoint directory to serve: its config, tensors and tokenizer
    params.py        Params and Completion of the offline engine
    offline.py       Engine: depth-wise batching on a transformers model
    generate.py      `loopwise generate`
    recipe.py        keys of `loopwise serve`
    defaults.py      the server's settings: the recipe, then the model's config
    vllm/            the vLLM plugin and server; only this package imports vLLM
    server.py        `loopwise serve`
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .offline import Completion, Engine, Params

__all__ = ["Completion", "Engine", "Params"]


def __getattr__(name: str) -> Any:  # the command imports this package, and must not wait for torch
    if name in __all__:
        from . import offline

        return getattr(offline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
