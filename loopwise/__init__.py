"""Loopwise: convert a pretrained decoder into a recurrent-depth model, retrain it, serve it.

Importing `loopwise` is cheap; the model classes load torch and transformers on first use.
"""

from typing import TYPE_CHECKING

from .version import __version__

__all__ = ["RecurrentDepthConfig", "RecurrentDepthForCausalLM", "__version__"]

if TYPE_CHECKING:
    from .model import RecurrentDepthConfig, RecurrentDepthForCausalLM


def __getattr__(name: str):
    if name in ("RecurrentDepthConfig", "RecurrentDepthForCausalLM"):
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module 'loopwise' has no attribute {name!r}")
