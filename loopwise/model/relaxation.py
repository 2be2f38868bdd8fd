"""Relaxation: a tied layer with LoRA factors and parameters of its own at every depth.

Relaxed recursive transformers, arXiv 2410.20672; DoRA, arXiv 2402.09353. The functions at the top are the arithmetic,
which training, the engine and vLLM share. Shapes: N rows, r rank; depths are counted from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, update_wrapper
from typing import Any, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

ROWS = 1024  # of a matrix that are converted to another dtype at a time


def matrix(linear: nn.Linear | Conv1D) -> torch.Tensor:
    """The weight [out, in] of a linear module. GPT-2's Conv1D keeps it transposed."""
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.T


def row_norms(matrix: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Norms [..., out] of the rows of W + B A, for W = matrix [out, in], A [..., r, in] and B [..., out, r]."""
    return torch.linalg.vector_norm(matrix + b @ a, dim=-1)


def relaxed_matrix(
    matrix: torch.Tensor, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor | None = None
) -> torch.Tensor:
    """W + B A for W = matrix [out, in], A [r, in] and B [out, r]; with DoRA its rows have the norms `magnitude` [out].

    In the dtype of the factors, which is at least as wide as W's. The result is the only tensor of its size that is
    made, but for DoRA on a transposed W: of large models it is one of the greatest. Source of DoRA: arXiv 2402.09353.
    """
    result = b @ a
    for sums, rows in zip(result.split(ROWS), matrix.split(ROWS), strict=True):  # a sum of two dtypes copies W whole
        sums += rows
    if magnitude is None:
        return result
    if not matrix.is_contiguous():  # norms are summed in the order of memory, which is W's
        result = result.T.contiguous().T
    return result.mul_((magnitude / torch.linalg.vector_norm(result, dim=1))[:, None])


def pack_depths(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors a [depths, r, in], b [depths, out, r] as two matrices [depths r, in], [out, depths r]."""
    return a.flatten(0, 1), b.transpose(0, 1).flatten(1)


def lora_by_depth(
    x: torch.Tensor,
    down: Callable[[torch.Tensor], torch.Tensor],
    ups: Sequence[tuple[int, Callable[[torch.Tensor], torch.Tensor]]],
    depth: torch.Tensor,
    column_depth: torch.Tensor,
) -> list[torch.Tensor]:
    """B_d (A_d x) for rows x [..., N, in] at depths of their own: depth [N]. Returns [..., N, out] for each of `ups`.

    down: the product with the packed A of all depths, and of all parts of a fused module, one after the other:
    [..., N, columns]; column_depth [columns].   ups: for each part its number of columns, and the product with its
    packed B. A row keeps its own depth's columns, so nothing is gathered, and shapes do not depend on the depths.
    """
    inner = down(x) * (depth[:, None] == column_depth)
    if len(ups) == 1:
        return [ups[0][1](inner)]
    pieces = inner.split([columns for columns, _ in ups], -1)
    return [up(piece) for (_, up), piece in zip(ups, pieces, strict=True)]


def dora_scale(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    magnitude: torch.Tensor,
    total: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The factor [..., out] that gives the rows of W + B A the lengths `magnitude` [..., out].

    weight [out, in], a [..., r, in], b [..., out, r].   total: sums squared lengths over ranks that share the input.
    As in PEFT, the lengths have no gradient.
    """
    norms = row_norms(weight.detach(), a.detach(), b.detach())
    return magnitude / (norms if total is None else total(norms.square()).sqrt())


def rescale(out: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The output of a linear module with its LoRA added, `out` [..., out], all but its `bias` multiplied by `scale`."""
    return out * scale if bias is None else (out - bias) * scale + bias


class PerDepth(nn.Module):
    """Parameters [depths, *shape] that one module of a layer has at every depth.

    They are read in a forward and nowhere else: there alone are they loaded, where a `device_map` offloads them.
    """

    def forward(self, depth: int, device: torch.device) -> dict[str, torch.Tensor]:
        """By name, the parameters [*shape] at `depth`, counted from 0, on `device`."""
        names = (name for name, one in self._parameters.items() if one is not None)
        return {name: getattr(self, name)[depth].to(device) for name in names}  # an attribute may be read from a file


class Factors(PerDepth):
    """LoRA of one linear module for every depth: at depth d it computes W x + B_d (A_d x). The scale is exactly 1.

    lora_A [depths, r, in] and lora_B [depths, out, r] hold all depths in one tensor each: so every parameter takes part
    in every step, and a batch of mixed depths can gather its factors. With `dora` (arXiv 2402.09353) the rows of
    W + B_d A_d have the norms dora_magnitude [depths, out].

    Replaces the forward of `linear`, and keeps a reference to it that is no submodule.
    """

    def __init__(self, linear: nn.Linear | Conv1D, depths: int, rank: int, dora: bool):
        super().__init__()
        out, width = matrix(linear).shape
        self.lora_A = nn.Parameter(linear.weight.new_empty(depths, rank, width))
        self.lora_B = nn.Parameter(linear.weight.new_empty(depths, out, rank))
        self.dora_magnitude = nn.Parameter(linear.weight.new_empty(depths, out)) if dora else None
        self.now: dict[str, torch.Tensor] = {}  # those of the running depth, written by `Relaxation`
        self._linear = (linear,)
        cast(Any, linear).forward = partial(self._run, linear)

    def reset_parameters(self) -> None:
        """Initialize the factors so that they change nothing yet: random A, zero B, magnitudes of the rows."""
        weight = None if self._linear[0].weight.is_meta else matrix(self._linear[0])
        init.normal_(self.lora_A, std=self.lora_A.shape[-1] ** -0.5)
        init.zeros_(self.lora_B)
        if self.dora_magnitude is not None and weight is not None:
            init.copy_(self.dora_magnitude, torch.linalg.vector_norm(weight, dim=1).expand_as(self.dora_magnitude))

    def _run(self, linear: nn.Linear | Conv1D, x: torch.Tensor) -> torch.Tensor:
        """The forward of `linear`: x [.., in] -> [.., out], with the LoRA of this depth."""
        forward: Any = type(linear).forward
        out = forward(linear, x)
        a, b = self.now["lora_A"], self.now["lora_B"]
        out = out + nn.functional.linear(nn.functional.linear(x, a), b)
        if "dora_magnitude" not in self.now:
            return out
        stored: Any = linear.bias
        return rescale(out, dora_scale(matrix(linear), a, b, self.now["dora_magnitude"]), stored)


class Relaxation(PerDepth):
    """Makes the core layer `layer` a different one at every depth: LoRA factors, and parameters that are not shared.

    rank: name of a linear module inside the layer -> rank of its `Factors`, which are a submodule of the same name.
    own: names of the layer's parameters that every depth has for itself; they are parameters [depths, *shape] here, and
        the layer loses its own.

    The layer is called with an argument `depth`; beyond the last depth, the last one's are used. Its forward is
    replaced by one that takes the argument off, so that it reaches every architecture's layers, and again when gradient
    checkpointing recomputes. Inside of a forward, its input is on the layer's device.
    """

    def __init__(self, layer: nn.Module, depths: int, rank: dict[str, int], own: list[str], dora: bool = False):
        super().__init__()
        self.depths = depths
        self.factors: dict[str, tuple[Factors, nn.Module]] = {}  # by path: those of a linear module, and the module
        self.own: dict[str, tuple[PerDepth, nn.Module, list[str]]] = {}  # by path: (here, the layer's module, names)
        for path, r in rank.items():
            linear: Any = layer.get_submodule(path)
            self.factors[path] = Factors(linear, depths, r, dora), linear
            parent, _, name = path.rpartition(".")
            self._branch(parent).add_module(name, self.factors[path][0])
        for path in own:
            parent, _, name = path.rpartition(".")
            here, module, names = self.own.setdefault(parent, (self._branch(parent), layer.get_submodule(parent), []))
            shared = module._parameters.pop(name)
            assert shared is not None
            here.register_parameter(name, nn.Parameter(shared.detach().expand(depths, *shared.shape).clone()))
            names.append(name)
        self._leave()
        self._layer = (layer,)
        layer.forward = update_wrapper(partial(self._run, layer), layer.forward)  # with the names of its arguments

    def detach(self) -> None:
        """Give the layer, and its linear modules, the forwards of their classes back."""
        for module in (self._layer[0], *(linear for _, linear in self.factors.values())):
            module.__dict__.pop("forward", None)

    def _branch(self, path: str) -> PerDepth:
        """The submodule at `path`, which is made where it does not exist yet."""
        module: PerDepth = self
        for name in path.split(".") if path else []:
            if name not in module._modules:
                module.add_module(name, PerDepth())
            module = cast(PerDepth, module._modules[name])
        return module

    def _run(self, layer: nn.Module, x: torch.Tensor, *args: Any, depth: int, **kwargs: Any) -> Any:
        """The forward of `layer`, for x [B, T, D] and its other arguments, with the parameters of `depth`."""
        try:
            self._enter(layer, min(depth, self.depths - 1), x.device)
            return type(layer).forward(layer, x, *args, **kwargs)
        finally:
            self._leave()

    def _enter(self, layer: nn.Module, depth: int, device: torch.device) -> None:
        """Give the modules of `layer` the parameters of `depth`. Raises ValueError for a linear module that is gone."""
        for path, (factors, linear) in self.factors.items():
            found = layer.get_submodule(path)
            if found is not linear and getattr(found, "base_layer", None) is not linear:
                raise ValueError(
                    f"{path} of a core layer was replaced by a {type(found).__name__} after loading, and the LoRA of "
                    "each depth stands on the module before: quantise what `loopwise export --unroll` writes"
                )
            factors.now = factors(depth, device)
        for path, (here, module, names) in self.own.items():
            values = self.factors[path][0].now if path in self.factors else here(depth, device)
            for name in names:
                object.__setattr__(module, name, values[name])

    def _leave(self) -> None:
        """The layer keeps the parameters of depth 0, to be copied and for their dtype."""
        for factors, _ in self.factors.values():
            factors.now = {}
        for here, module, names in self.own.values():
            stored = dict(here.named_parameters(recurse=False))  # an attribute may be read from a file
            for name in names:
                object.__setattr__(module, name, stored[name].detach()[0])
