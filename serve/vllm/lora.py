"""LoRA and DoRA by depth on vLLM's linear modules: factors sharded over ranks, and placed in fused modules.

vLLM fuses some of the source's modules (q, k and v into one, gate and up into another) and shards them over ranks. Each
LoRA adds to the outputs of its own part. The arithmetic is model/relaxation.py's. Shapes: N rows, r rank. A depth is a
number or a tensor [1], for all rows, or a tensor [N].
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from ...model.relaxation import dora_scale, lora_by_depth, pack_depths, rescale
from ..engine.relaxation import add_lora

Depth = int | torch.Tensor
PARTS: dict[type, dict[str, Any]] = {
    QKVParallelLinear: {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    MergedColumnParallelLinear: {"gate_proj": 0, "up_proj": 1},
}


def locate(layer: nn.Module, path: str) -> tuple[str, Any]:
    """The place of the source's module `path` in vLLM's `layer`: dotted name, and the id of its part of a fused module.

    Raises ValueError where the layer has none.
    """
    parent, _, name = path.rpartition(".")
    try:
        holder = layer.get_submodule(parent)
    except AttributeError:
        raise ValueError(f"vLLM's {type(layer).__name__} has no {parent}") from None
    if name in holder._modules:
        return path, None
    for kind, parts in PARTS.items():
        for child, module in holder.named_children():
            if isinstance(module, kind) and name in parts:
                return f"{parent}.{child}" if parent else child, parts[name]
    raise ValueError(f"vLLM's {type(layer).__name__} has no module for {path}")


def part_number(part: Any) -> Any:
    """The number of a part among its fused module's; None for a module that is not fused."""
    return {"q": 0, "k": 1, "v": 2}.get(part, part)


def load_shard(module: Any, like: torch.Tensor, whole: torch.Tensor, part: Any = None, **dims: int) -> torch.Tensor:
    """A copy of `like` into which vLLM's loader of `module` has put this rank's share of `whole`."""
    parameter = nn.Parameter(like.clone(), requires_grad=False)
    for name, value in dims.items():
        setattr(parameter, name, value)
    module.weight_loader(parameter, whole.to(like.dtype), *(() if part is None else (part,)))
    return parameter.data


class Factors(nn.Module):
    """This rank's share of the LoRA of one part of a linear module of vLLM, at every depth; the scale is exactly 1.

    lora_A [depths, r, in], lora_B [depths, out, r], dora_magnitude [depths, out]. A row-parallel module's input is cut:
    each rank has a part of A x, and they are summed before B.
    """

    def __init__(self, linear: Any, part: Any, depths: int, rank: int, dora: bool):
        super().__init__()
        self._linear, self.part, self.depths, self.rank = (linear,), part, depths, rank  # a tuple: no child
        sizes = linear.output_partition_sizes
        place = part_number(part)
        self.start = 0 if part is None else sum(sizes[:place])
        self.stop = sum(sizes) if part is None else self.start + sizes[place]
        self.cut_input = isinstance(linear, RowParallelLinear)
        if self.cut_input and not linear.reduce_results:
            raise ValueError(f"{type(linear).__name__} leaves its sum to others: its LoRA would be added on every rank")
        self.total = tensor_model_parallel_all_reduce if self.cut_input and linear.tp_size > 1 else None
        self.lora_A = nn.Parameter(torch.empty(depths, rank, linear.input_size_per_partition), requires_grad=False)
        self.lora_B = nn.Parameter(torch.empty(depths, self.stop - self.start, rank), requires_grad=False)
        self.dora_magnitude = None
        if dora:
            self.dora_magnitude = nn.Parameter(torch.empty(depths, self.stop - self.start), requires_grad=False)
        self.scale: torch.Tensor | None = None  # [depths, out], with dora

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Load this rank's share of checkpoint tensor `name`."""
        linear = self._linear[0]
        for mine, whole in zip(getattr(self, name).data, tensor, strict=True):
            if name == "lora_A":
                mine.copy_(load_shard(linear, mine, whole, input_dim=1) if self.cut_input else whole)
            else:
                mine.copy_(self._rows(whole))

    def _rows(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's rows of an output-major tensor of this part."""
        linear = self._linear[0]
        if self.cut_input:
            return whole
        fused = whole.new_zeros(sum(linear.output_partition_sizes), *whole.shape[1:])
        return load_shard(linear, fused, whole, self.part, output_dim=0)[self.start : self.stop]

    def finish(self) -> None:
        """Compute DoRA's scale, once all weights are loaded."""
        if self.dora_magnitude is None:
            return
        weight = self._linear[0].weight[self.start : self.stop]
        values = (value.float() for value in (weight, self.lora_A, self.lora_B, self.dora_magnitude))
        self.scale = dora_scale(*values, total=self.total).to(self.lora_A.dtype)

    def add(self, out: torch.Tensor, x: torch.Tensor, depth: Depth) -> None:
        """Add B A x to this part's columns of `out` in place, for x [N, in] at one depth."""
        add_lora(out, x, self.lora_A, self.lora_B, depth, self.start, self.total)

    def rescaled(self, out: torch.Tensor, depth: Depth) -> torch.Tensor:
        """DoRA of this part's outputs [N, out], to which the LoRA has been added; without it, `out` itself."""
        if self.scale is None:
            return out
        bias = self._linear[0].bias
        return rescale(out, self.scale[depth], None if bias is None else bias[self.start : self.stop])


class AllDepths(nn.Module):
    """LoRA of one linear module for rows at mixed depths: `lora_by_depth` with matrices that vLLM packs as its own.

    The A of all parts and depths are one matrix; each part has one with the B of all depths.
    """

    def __init__(self, factors: list[Factors]):
        super().__init__()
        self._factors = (factors,)  # a tuple: no children
        widths = [f.depths * f.rank for f in factors]
        flags: dict[str, Any] = {"bias": False, "return_bias": False}
        self.a = ReplicatedLinear(factors[0].lora_A.shape[2], sum(widths), **flags)
        self.b = nn.ModuleList(
            ReplicatedLinear(width, f.stop - f.start, **flags) for f, width in zip(factors, widths, strict=True)
        )
        self._ups = list(zip(widths, self.b, strict=True))
        column_depth = torch.cat([torch.arange(f.depths).repeat_interleave(f.rank) for f in factors])
        self.register_buffer("column_depth", column_depth, persistent=False)

    def finish(self) -> None:
        """Copy the matrices of the factors, once all are loaded."""
        packed = [pack_depths(f.lora_A, f.lora_B) for f in self._factors[0]]
        cast(Any, self.a).weight.data.copy_(torch.cat([a for a, _ in packed]))
        for b, (_, matrix) in zip(cast(Any, self.b), packed, strict=True):
            b.weight.data.copy_(matrix)

    def forward(self, x: torch.Tensor, depth: torch.Tensor) -> list[torch.Tensor]:
        """The LoRA's share of each part's outputs [N, out], for x [N, in]."""
        return lora_by_depth(x, self._down, self._ups, depth, cast(torch.Tensor, self.column_depth))

    def _down(self, x: torch.Tensor) -> torch.Tensor:
        total, inner = self._factors[0][0].total, self.a(x)
        return inner if total is None else total(inner)


class Change:
    """The change that a depth makes to the output of a linear module: LoRA of its parts, and a bias [depths, out]."""

    def __init__(self, factors: list[Factors], bias: torch.Tensor | None):
        self.factors, self.bias = sorted(factors, key=lambda f: f.start), bias
        self.mixed: AllDepths | None = None  # the factors, for rows at depths of their own

    def __call__(self, out: Any, x: torch.Tensor, depth: Depth) -> Any:
        """The module's output `out` for x [N, in], changed; a tensor, or a tuple that begins with one. It may be
        overwritten."""
        first = out[0] if isinstance(out, tuple) else out
        if self.factors:
            first = self._relaxed(first, x, _clamped(depth, self.factors[0].depths))
        if self.bias is not None:
            first = first + self.bias[_clamped(depth, len(self.bias))]
        return (first, *out[1:]) if isinstance(out, tuple) else first

    def _relaxed(self, out: torch.Tensor, x: torch.Tensor, depth: Depth) -> torch.Tensor:
        added: list[torch.Tensor] = []
        if isinstance(depth, int) or len(depth) == 1:
            for factors in self.factors:
                factors.add(out, x, depth)
            if all(factors.scale is None for factors in self.factors):
                return out
        else:
            assert self.mixed is not None, "Relaxation.relax_rows comes first"
            added = self.mixed(x, depth)
        end, pieces = 0, []
        for n, factors in enumerate(self.factors):
            if factors.start > end:
                pieces.append(out[..., end : factors.start])
            end = factors.stop
            mine = out[..., factors.start : end]
            pieces.append(factors.rescaled(mine + added[n] if added else mine, depth))
        pieces += [out[..., end:]] if end < out.shape[-1] else []
        return torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]


def _clamped(depth: Depth, depths: int) -> Depth:
    """The last of `depths` stands for all deeper ones."""
    return min(depth, depths - 1) if isinstance(depth, int) else depth.clamp(max=depths - 1)
