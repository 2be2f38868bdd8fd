"""A relaxed layer at one depth: LoRA, biases and norms of that depth in a copy of vLLM's layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..layers import shallow_copy
from ..lora import Change
from ..relaxation import Relaxation


def relax_copy(relaxation: Relaxation, layer: nn.Module, depth: int) -> None:
    """Make `layer`, a copy of the relaxed one whose modules may be replaced, the layer at `depth`."""
    depth = min(depth, relaxation.depths - 1)
    for name, change in relaxation.linear_changes().items():
        parent = _copied(layer, name.rpartition(".")[0])
        last = name.rpartition(".")[2]
        parent._modules[last] = Changed(parent._modules[last], change, depth)
    for name, values in relaxation.norms().items():
        module = _copied(layer, name)
        module._parameters = {name: value for name, value in module._parameters.items() if name not in values}
        module.__dict__.update({parameter: value[depth] for parameter, value in values.items()})


class Changed(nn.Module):
    """Stands for a linear module at one depth. It is no copy: vLLM packs a module's weight when all is loaded."""

    quant_method = None  # vLLM finds the modules to pack by it: the original has one

    def __init__(self, linear: Any, change: Change, depth: int):
        super().__init__()
        self._linear, self._change, self._depth = (linear,), change, depth

    def forward(self, x: torch.Tensor) -> Any:
        return self._change(self._linear[0](x), x, self._depth)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_linear"][0], name)


def _copied(layer: nn.Module, path: str) -> Any:
    """The module at `path`; it and all on the way to it are replaced by shallow copies."""
    module: Any = layer
    for name in path.split("."):
        child = module._modules[name]
        assert child is not None
        new = shallow_copy(child, copy.copy(child._modules))
        module._modules[name] = new
        module = new
    return module
