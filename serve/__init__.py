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

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.diffusion_settings import DiffusionSettings
    from .offline import Engine
    from .params import Completion, Params

__all__ = ["Completion", "DiffusionSettings", "Engine", "Params"]
_FILES = {
    "Completion": ".params",
    "DiffusionSettings": ".engine.diffusion_settings",
    "Engine": ".offline",
    "Params": ".params",
}


def __getattr__(name: str) -> Any:  # the command imports this package, and must not wait for torch
    if name in _FILES:
        return getattr(import_module(_FILES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
