"""Relaxation on vLLM's layers: LoRA factors, biases and norms that a core layer has for every depth.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import LinearBase

from .lora import AllDepths, Change, Factors, load_shard, locate, part_number


class Relaxation(nn.Module):
    """The tensors that core layer `layer` of vLLM has for every depth; fields as in model.relaxation.Relaxation.

    `load` gets them from a checkpoint; `finish` follows when all weights are loaded. `relax_rows` makes the layer
    itself one whose rows have depths of their own; `fixed/relaxation.py` makes a copy of the layer for one depth.
    """

    def __init__(self, layer: nn.Module, depths: int, rank: dict[str, int], own: list[str], dora: bool = False):
        super().__init__()
        self.depths, self._layer = depths, (layer,)
        self.factors, self.per_depth = nn.ModuleDict(), nn.ParameterDict()
        self.mixed: Any = nn.ModuleDict()  # set by relax_rows: AllDepths by vLLM's module
        self._factors: dict[str, tuple[str, Factors]] = {}  # the source's name -> vLLM's, factors
        self._places: dict[str, tuple[str, Any]] = {}  # the source's parameter -> vLLM's, part
        for path, r in rank.items():
            name, part = locate(layer, path)
            factors = Factors(layer.get_submodule(name), part, depths, r, dora)
            self._factors[path] = name, factors
            self.factors[path.replace(".", "-")] = factors
        for path in own:
            parent, _, last = path.rpartition(".")
            name, part = locate(layer, parent) if parent else ("", None)
            target = f"{name}.{last}"
            shared = layer.get_parameter(target)
            self._places[path] = target, part
            if target.replace(".", "-") not in self.per_depth:
                values = shared.data.new_empty(depths, *shared.shape)
                self.per_depth[target.replace(".", "-")] = nn.Parameter(values, requires_grad=False)
        self._loaded: set[tuple[str, Any]] = set()
        self._depths_of_rows: Callable[[], torch.Tensor] | None = None  # set by relax_rows

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Load this rank's share of checkpoint tensor `name`, a name within this layer's relaxation."""
        path, _, last = name.rpartition(".")
        if last in ("lora_A", "lora_B", "dora_magnitude"):
            self._factors[path][1].load(last, tensor)
            return
        target, part = self._places[name]
        module, parameter = self._place(target)
        shared: Any = module._parameters[parameter]
        for mine, whole in zip(self._values(target), tensor, strict=True):
            dims = {key: getattr(shared, key) for key in ("output_dim", "input_dim") if hasattr(shared, key)}
            loaded = load_shard(module, mine, whole, part, **dims) if hasattr(module, "weight_loader") else whole
            mine.copy_(loaded)
        self._loaded.add((target, part))

    def finish(self) -> None:
        """Complete the tensors, once all weights are loaded. Raises ValueError for a matrix of its own at every depth.

        Parts of a fused parameter that all depths share are copied to every depth. Linear modules lose the biases that
        are added to their outputs.
        """
        for _, factors in self._factors.values():
            factors.finish()
        for mixed in self.mixed.values():
            mixed.finish()
        for target in self.replaced():
            module, parameter = self._place(target)
            values, shared = self._values(target), module._parameters[parameter].data
            parts = {part_number(part) for name, part in self._loaded if name == target}
            if None not in parts:
                sizes = module.output_partition_sizes
                for number, end in enumerate(torch.tensor(sizes).cumsum(0).tolist()):
                    if number not in parts:
                        values[:, end - sizes[number] : end] = shared[end - sizes[number] : end]
            if isinstance(module, LinearBase):
                if parameter != "bias":
                    raise ValueError(f"{target}: a matrix for every depth; only biases and norms can be")
                shared.zero_()
        if self._depths_of_rows is not None:
            for name, values in self.norms().items():
                _relax_norm(self._layer[0].get_submodule(name), values, self._depths_of_rows)

    def replaced(self) -> set[str]:
        """Names of the layer's parameters that no longer count."""
        return {target for target, _ in self._places.values()}

    def relax_rows(self, depths: Callable[[], torch.Tensor]) -> None:
        """Make the layer itself one whose rows are at the depths [N] or [1] that `depths()` returns."""
        for name, change in self.linear_changes().items():
            if change.factors:
                change.mixed = self.mixed[name.replace(".", "-")] = AllDepths(change.factors)

            def hook(_: nn.Module, args: tuple, out: Any, change=change) -> Any:
                return change(out, args[0], depths())

            self._layer[0].get_submodule(name).register_forward_hook(hook)
        self._depths_of_rows = depths

    def linear_changes(self) -> dict[str, Change]:
        """The changes of outputs, by the names of vLLM's linear modules."""
        factors: dict[str, list[Factors]] = {}
        for name, one in self._factors.values():
            factors.setdefault(name, []).append(one)
        biases = {
            target.rpartition(".")[0]: self._values(target)
            for target in self.replaced()
            if isinstance(self._place(target)[0], LinearBase)
        }
        return {name: Change(factors.get(name, []), biases.get(name)) for name in sorted({*factors, *biases})}

    def norms(self) -> dict[str, dict[str, torch.Tensor]]:
        """Parameters [depths, size] by their names, by the names of vLLM's norms."""
        norms: dict[str, dict[str, torch.Tensor]] = {}
        for target in sorted(self.replaced()):
            if not isinstance(self._place(target)[0], LinearBase):
                name, _, parameter = target.rpartition(".")
                norms.setdefault(name, {})[parameter] = self._values(target)
        return norms

    def _values(self, target: str) -> torch.Tensor:
        """The values [depths, ...] of vLLM's parameter `target`."""
        return self.per_depth[target.replace(".", "-")].data

    def _place(self, target: str) -> tuple[Any, str]:
        """The module of vLLM's parameter `target`, and its name in there."""
        parent, _, parameter = target.rpartition(".")
        return self._layer[0].get_submodule(parent), parameter


def _relax_norm(module: Any, values: dict[str, torch.Tensor], depths: Callable[[], torch.Tensor]) -> None:
    """Make a norm use the parameters `values` [depths, size] of each row's depth: it computes with neutral parameters,
    then its output is multiplied and added to."""
    last = len(next(iter(values.values()))) - 1
    weight, bias = values.get("weight"), values.get("bias")
    if weight is not None:
        offset = isinstance(module, GemmaRMSNorm)  # whose weights count from -1
        weight = weight + 1 if offset else weight
        module.weight.data.fill_(0.0 if offset else 1.0)
        if bias is None and getattr(module, "bias", None) is not None:
            bias = module.bias.data.expand(last + 1, -1).clone()
    if bias is not None:
        module.bias.data.zero_()

    def hook(_: nn.Module, args: tuple, out: Any) -> Any:
        at = depths().clamp(max=last)
        first = out[0] if isinstance(out, tuple) else out
        for values, combine in ((weight, torch.mul), (bias, torch.add)):
            if values is not None:  # a norm may see each row once for every head
                first = combine(first, values[at].view(len(at), *[1] * (first.dim() - 2), -1))
        return (first, *out[1:]) if isinstance(out, tuple) else first

    module.register_forward_hook(hook)
