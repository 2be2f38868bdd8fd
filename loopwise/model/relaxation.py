"""Relaxation: a tied layer with LoRA factors and parameters of its own at every depth.

Relaxed recursive transformers, arXiv 2410.20672; DoRA, arXiv 2402.09353. The functions at the top are the arithmetic,
which training, the engine and vLLM share. Shapes: N rows, r rank; depths are counted from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


class Factors(nn.Module):
    """LoRA of one linear module for every depth: at depth d it computes W x + B_d (A_d x). The scale is exactly 1.

    lora_A [depths, r, in] and lora_B [depths, out, r] hold all depths in one tensor each: so every parameter takes part
    in every step, and a batch of mixed depths can gather its factors. With `dora` (arXiv 2402.09353) the rows of
    W + B_d A_d have the norms dora_magnitude [depths, out].

    Registers a forward hook on `linear`, and keeps a reference to it that is no submodule.
    """

    def __init__(self, linear: nn.Linear | Conv1D, depths: int, rank: int, dora: bool):
        super().__init__()
        out, width = matrix(linear).shape
        self.lora_A = nn.Parameter(linear.weight.new_empty(depths, rank, width))
        self.lora_B = nn.Parameter(linear.weight.new_empty(depths, out, rank))
        self.dora_magnitude = nn.Parameter(linear.weight.new_empty(depths, out)) if dora else None
        self.depth = 0  # the depth of the next call, counted from 0, written by `Relaxation`
        self._linear = (linear,)
        linear.register_forward_hook(self._add)

    def reset_parameters(self) -> None:
        """Initialize the factors so that they change nothing yet: random A, zero B, magnitudes of the rows."""
        weight = None if self._linear[0].weight.is_meta else matrix(self._linear[0])
        init.normal_(self.lora_A, std=self.lora_A.shape[-1] ** -0.5)
        init.zeros_(self.lora_B)
        if self.dora_magnitude is not None and weight is not None:
            init.copy_(self.dora_magnitude, torch.linalg.vector_norm(weight, dim=1).expand_as(self.dora_magnitude))

    def _add(self, linear: nn.Linear | Conv1D, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        """A forward hook: the output [.., out] of `linear` with the LoRA of this depth."""
        a, b = self.lora_A[self.depth], self.lora_B[self.depth]
        out = out + nn.functional.linear(nn.functional.linear(args[0], a), b)
        if self.dora_magnitude is None:
            return out
        stored: Any = linear.bias
        return rescale(out, dora_scale(matrix(linear), a, b, self.dora_magnitude[self.depth]), stored)


class Relaxation(nn.Module):
    """Makes the core layer `layer` a different one at every depth: LoRA factors, and parameters that are not shared.

    rank: name of a linear module inside the layer -> rank of its `Factors`, which are a submodule of the same name.
    own: names of the layer's parameters that every depth has for itself; they are parameters [depths, *shape] here, and
        the layer loses its own.

    The layer is called with an argument `depth`; beyond the last depth, the last one's are used. A hook takes the
    argument off, so that it reaches every architecture's layers, and again when gradient checkpointing recomputes.
    """

    def __init__(self, layer: nn.Module, depths: int, rank: dict[str, int], own: list[str], dora: bool = False):
        super().__init__()
        self.depths = depths
        self._factors: list[tuple[Factors, nn.Module]] = []
        self._paths = list(rank)
        for path, r in rank.items():
            linear: Any = layer.get_submodule(path)
            factors = Factors(linear, depths, r, dora)
            parent, _, name = path.rpartition(".")
            self._branch(parent).add_module(name, factors)
            self._factors.append((factors, linear))
        self._own: list[tuple[nn.Module, nn.Module, str]] = []  # (module of the layer, module here, parameter)
        for path in own:
            parent, _, name = path.rpartition(".")
            module, here = layer.get_submodule(parent), self._branch(parent)
            shared = module._parameters.pop(name)
            assert shared is not None
            here.register_parameter(name, nn.Parameter(shared.detach().expand(depths, *shared.shape).clone()))
            self._own.append((module, here, name))
        self._leave()
        layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        layer.register_forward_hook(self._leave)

    def _branch(self, path: str) -> nn.Module:
        """The submodule at `path`, which is made where it does not exist yet."""
        module: nn.Module = self
        for name in path.split(".") if path else []:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        return module

    def _enter(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward pre-hook: the layer gets the parameters of `depth`, and its other arguments."""
        depth = min(kwargs.pop("depth"), self.depths - 1)
        for path, (_, linear) in zip(self._paths, self._factors, strict=True):
            found = layer.get_submodule(path)
            if found is not linear and getattr(found, "base_layer", None) is not linear:
                raise ValueError(
                    f"{path} of a core layer was replaced by a {type(found).__name__} after loading, and the LoRA of "
                    "each depth stands on the module before: quantise what `loopwise export --unroll` writes"
                )
        for factors, _ in self._factors:
            factors.depth = depth
        for module, here, name in self._own:
            object.__setattr__(module, name, getattr(here, name)[depth])
        return args, kwargs

    def _leave(self, *_: object) -> None:
        """A forward hook: the layer keeps the parameters of depth 0, to be copied and for their dtype."""
        for module, here, name in self._own:
            object.__setattr__(module, name, getattr(here, name).detach()[0])
