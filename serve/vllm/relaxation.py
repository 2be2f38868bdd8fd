"""Relaxation on vLLM's linear modules and norms: what a core layer has of its own at every depth.

vLLM fuses some of the source's modules (q, k and v into one, gate and up into another) and cuts them over tensor-
parallel ranks. Each LoRA adds to the outputs of its own part; what it is given is cut by the module's own loader.
Shapes: N rows, r rank. A depth is a number or a tensor [1], of all rows, or a tensor [N].
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from ..engine.relaxation import add_product
from .layers import shallow_copy

Depth = int | torch.Tensor
PARTS: dict[type, dict[str, Any]] = {
    QKVParallelLinear: {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    MergedColumnParallelLinear: {"gate_proj": 0, "up_proj": 1},
}


def locate(layer: nn.Module, path: str) -> tuple[str, Any]:
    """Where the source's module `path` is in vLLM's `layer`: dotted name, and the id of its part of a fused module."""
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


class Factors(nn.Module):
    """LoRA of one part of a linear module of vLLM, this rank's share, at every depth; the scale is exactly 1.

    lora_A [depths, r, in], lora_B [depths, out, r], dora_magnitude [depths, out]. A row-parallel module's input is cut,
    so each rank has a part of A x, and they are added up before B.
    """

    def __init__(self, linear: Any, part: Any, depths: int, rank: int, dora: bool):
        super().__init__()
        self._linear, self.part, self.depths, self.rank = (linear,), part, depths, rank  # a tuple: no child
        sizes = linear.output_partition_sizes
        place = _number(part)
        self.start = 0 if part is None else sum(sizes[:place])
        self.stop = sum(sizes) if part is None else self.start + sizes[place]
        self.cut_input = isinstance(linear, RowParallelLinear)
        if self.cut_input and not linear.reduce_results:
            raise ValueError(
                f"{type(linear).__name__} leaves its sum to others, so a LoRA of it would be counted often"
            )
        self.lora_A = nn.Parameter(torch.empty(depths, rank, linear.input_size_per_partition), requires_grad=False)
        self.lora_B = nn.Parameter(torch.empty(depths, self.stop - self.start, rank), requires_grad=False)
        self.dora_magnitude = None
        if dora:
            self.dora_magnitude = nn.Parameter(torch.empty(depths, self.stop - self.start), requires_grad=False)
        self.scale: torch.Tensor | None = None  # [depths, out], of dora

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Take this rank's share of checkpoint tensor `name`."""
        linear = self._linear[0]
        for mine, whole in zip(getattr(self, name).data, tensor, strict=True):
            if name == "lora_A":
                mine.copy_(_loaded(linear, mine, whole, input_dim=1) if self.cut_input else whole)
            else:
                mine.copy_(self._rows(whole))

    def _rows(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's rows of an output-major tensor of this part."""
        linear = self._linear[0]
        if self.cut_input:
            return whole
        fused = whole.new_zeros(sum(linear.output_partition_sizes), *whole.shape[1:])
        return _loaded(linear, fused, whole, self.part, output_dim=0)[self.start : self.stop]

    def measure(self) -> None:
        """Once all is loaded: the factor that gives the rows of W + B A the lengths dora_magnitude."""
        if self.dora_magnitude is None:
            return
        whole = self._linear[0].weight[self.start : self.stop].float() + self.lora_B.float() @ self.lora_A.float()
        squares = whole.square().sum(-1)
        if self.cut_input and self._linear[0].tp_size > 1:
            squares = tensor_model_parallel_all_reduce(squares)
        self.scale = (self.dora_magnitude.float() / squares.sqrt()).to(self.lora_A.dtype)

    def add(self, out: torch.Tensor, x: torch.Tensor, depth: Depth) -> None:
        """Add B A x to this part's columns of `out`, for x [N, in] of one depth."""
        a, b = self.lora_A, self.lora_B
        a, b = (m[depth] if isinstance(depth, int) else m.index_select(0, depth)[0] for m in (a, b))
        add_product(out, self.summed(nn.functional.linear(x, a)), b, self.start)

    def summed(self, inner: torch.Tensor) -> torch.Tensor:
        """What all ranks' parts of A x make together."""
        cut = self.cut_input and self._linear[0].tp_size > 1
        return tensor_model_parallel_all_reduce(inner) if cut else inner

    def scaled(self, out: torch.Tensor, depth: Depth) -> torch.Tensor:
        """This part's outputs [N, out], to which the LoRA has been added."""
        if self.scale is None:
            return out
        bias = self._linear[0].bias
        bias = 0 if bias is None else bias[self.start : self.stop]
        return (out - bias) * self.scale[depth] + bias


class AllDepths(nn.Module):
    """LoRA of one linear module for rows at mixed depths: one product with the A of all parts and depths, of which a
    row keeps its own depth's, then one for each part with the B of all depths. So nothing is gathered, shapes do not
    depend on the depths, and vLLM packs the matrices as it packs its own."""

    def __init__(self, factors: list[Factors]):
        super().__init__()
        self._factors = (factors,)  # a tuple: no children
        self.widths = [f.depths * f.rank for f in factors]
        flags: dict[str, Any] = {"bias": False, "return_bias": False}
        self.a = ReplicatedLinear(factors[0].lora_A.shape[2], sum(self.widths), **flags)
        self.b = nn.ModuleList(
            ReplicatedLinear(width, f.stop - f.start, **flags) for f, width in zip(factors, self.widths, strict=True)
        )
        of = torch.cat([torch.arange(f.depths).repeat_interleave(f.rank) for f in factors])
        self.register_buffer("of", of, persistent=False)  # the depth of each row of A

    def fill(self) -> None:
        """Once all is loaded: take the matrices of the factors."""
        factors = self._factors[0]
        cast(Any, self.a).weight.data.copy_(torch.cat([f.lora_A.flatten(0, 1) for f in factors]))
        for b, f in zip(cast(Any, self.b), cast(Any, factors), strict=True):
            b.weight.data.copy_(f.lora_B.transpose(0, 1).flatten(1))

    def forward(self, x: torch.Tensor, depth: torch.Tensor) -> list[torch.Tensor]:
        """What each part's outputs get [N, out], for x [N, in]."""
        inner = self._factors[0][0].summed(self.a(x) * (depth[:, None] == cast(torch.Tensor, self.of)))
        return [b(part) for b, part in zip(cast(Any, self.b), inner.split(self.widths, -1), strict=True)]


class Relaxation(nn.Module):
    """What core layer `layer` of vLLM has of its own at every depth; fields as in model.relaxation.Relaxation."""

    def __init__(self, layer: nn.Module, depths: int, rank: dict[str, int], own: list[str], dora: bool = False):
        super().__init__()
        self.depths, self._layer = depths, (layer,)
        self.factors, self.own = nn.ModuleDict(), nn.ParameterDict()
        self.mixed: Any = nn.ModuleDict()  # of by_row: AllDepths by vLLM's module
        self._factors: dict[str, tuple[str, Factors]] = {}  # the source's name -> vLLM's, factors
        self._own: dict[str, tuple[str, Any]] = {}  # the source's parameter -> vLLM's, part
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
            self._own[path] = target, part
            if target.replace(".", "-") not in self.own:
                values = shared.data.new_empty(depths, *shared.shape)
                self.own[target.replace(".", "-")] = nn.Parameter(values, requires_grad=False)
        self._loaded: set[tuple[str, Any]] = set()
        self._depths_of_rows: Callable[[], torch.Tensor] | None = None  # of by_row

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Take checkpoint tensor `name`, counted from the relaxation of this layer."""
        path, _, last = name.rpartition(".")
        if last in ("lora_A", "lora_B", "dora_magnitude"):
            self._factors[path][1].load(last, tensor)
            return
        target, part = self._own[name]
        parent, _, parameter = target.rpartition(".")
        module: Any = self._layer[0].get_submodule(parent)
        shared: Any = module._parameters[parameter]
        for mine, whole in zip(self.own[target.replace(".", "-")].data, tensor, strict=True):
            dims = {key: getattr(shared, key) for key in ("output_dim", "input_dim") if hasattr(shared, key)}
            loaded = _loaded(module, mine, whole, part, **dims) if hasattr(module, "weight_loader") else whole
            mine.copy_(loaded)
        self._loaded.add((target, part))

    def finish(self) -> None:
        """Once all is loaded: what is shared stands at every depth, too, and linear modules lose the biases that are
        added to their outputs."""
        for _, factors in self._factors.values():
            factors.measure()
        for mixed in self.mixed.values():
            mixed.fill()
        for target in self.replaced():
            module, parameter = self._place(target)
            own, shared = self.own[target.replace(".", "-")].data, module._parameters[parameter].data
            parts = {_number(part) for name, part in self._loaded if name == target}
            if None not in parts:
                sizes = module.output_partition_sizes
                for number, end in enumerate(torch.tensor(sizes).cumsum(0).tolist()):
                    if number not in parts:
                        own[:, end - sizes[number] : end] = shared[end - sizes[number] : end]
            if isinstance(module, LinearBase):
                if parameter != "bias":
                    raise ValueError(f"{target}: a matrix for every depth; only biases and norms can be")
                shared.zero_()
        if self._depths_of_rows is not None:
            for name, values in self._norms().items():
                _norm_by_row(self._layer[0].get_submodule(name), values, self._depths_of_rows)

    def replaced(self) -> set[str]:
        """Names of vLLM's parameters of the layer that no longer count."""
        return {target for target, _ in self._own.values()}

    def at(self, view: nn.Module, depth: int) -> None:
        """Make `view`, a view of the layer whose modules may be replaced, the layer at `depth`."""
        depth = min(depth, self.depths - 1)
        for name, change in self._linear_changes().items():
            parent = _own_copy(view, name.rpartition(".")[0])
            last = name.rpartition(".")[2]
            parent._modules[last] = Changed(parent._modules[last], change, depth)
        for name, values in self._norms().items():
            module = _own_copy(view, name)
            module._parameters = {name: value for name, value in module._parameters.items() if name not in values}
            module.__dict__.update({parameter: value[depth] for parameter, value in values.items()})

    def by_row(self, depths: Callable[[], torch.Tensor]) -> None:
        """Make the layer itself one whose rows are at the depths that `depths` tells."""
        for name, change in self._linear_changes().items():
            if change.factors:
                change.mixed = self.mixed[name.replace(".", "-")] = AllDepths(change.factors)

            def hook(_: nn.Module, args: tuple, out: Any, change=change) -> Any:
                return change(out, args[0], depths())

            self._layer[0].get_submodule(name).register_forward_hook(hook)
        self._depths_of_rows = depths

    def _place(self, target: str) -> tuple[Any, str]:
        parent, _, parameter = target.rpartition(".")
        return self._layer[0].get_submodule(parent), parameter

    def _linear_changes(self) -> dict[str, Change]:
        """vLLM's linear modules by name, and what changes of their outputs."""
        factors: dict[str, list[Factors]] = {}
        for name, one in self._factors.values():
            factors.setdefault(name, []).append(one)
        biases = {
            target.rpartition(".")[0]: self.own[target.replace(".", "-")].data
            for target in self.replaced()
            if isinstance(self._place(target)[0], LinearBase)
        }
        return {name: Change(factors.get(name, []), biases.get(name)) for name in sorted({*factors, *biases})}

    def _norms(self) -> dict[str, dict[str, torch.Tensor]]:
        """vLLM's norms by name, and their own parameters [depths, size]."""
        norms: dict[str, dict[str, torch.Tensor]] = {}
        for target in sorted(self.replaced()):
            module, parameter = self._place(target)
            if not isinstance(module, LinearBase):
                values = self.own[target.replace(".", "-")].data
                norms.setdefault(target.rpartition(".")[0], {})[parameter] = values
        return norms


class Change:
    """What a depth of its own does to the output of a linear module: LoRA of its parts, and a bias [depths, out]."""

    def __init__(self, factors: list[Factors], bias: torch.Tensor | None):
        self.factors, self.bias = sorted(factors, key=lambda f: f.start), bias
        self.mixed: AllDepths | None = None  # the factors, for rows at depths of their own

    def __call__(self, out: Any, x: torch.Tensor, depth: Depth) -> Any:
        """`out` of the module for x [N, in], a tensor or a tuple that begins with it; it may be overwritten."""
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
            assert self.mixed is not None, "by_row comes first"
            added = self.mixed(x, depth)
        end, pieces = 0, []
        for n, factors in enumerate(self.factors):
            if factors.start > end:
                pieces.append(out[..., end : factors.start])
            end = factors.stop
            own = out[..., factors.start : end]
            pieces.append(factors.scaled(own + added[n] if added else own, depth))
        pieces += [out[..., end:]] if end < out.shape[-1] else []
        return torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]


def _clamped(depth: Depth, depths: int) -> Depth:
    """The last of `depths` stands for all that are deeper."""
    return min(depth, depths - 1) if isinstance(depth, int) else depth.clamp(max=depths - 1)


class Changed(nn.Module):
    """Stands for a linear module at one depth. No copy of it: vLLM packs a module's weight when all is loaded."""

    quant_method = None  # by which vLLM finds what to pack: the module itself, once

    def __init__(self, linear: Any, change: Change, depth: int):
        super().__init__()
        self._linear, self._change, self._depth = (linear,), change, depth

    def forward(self, x: torch.Tensor) -> Any:
        return self._change(self._linear[0](x), x, self._depth)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_linear"][0], name)


def _norm_by_row(module: Any, values: dict[str, torch.Tensor], depths: Callable[[], torch.Tensor]) -> None:
    """Let a norm meet `values` [depths, size] of each row's depth: it computes with neutral parameters, and its output
    is multiplied and added to."""
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


def _number(part: Any) -> Any:
    return {"q": 0, "k": 1, "v": 2}.get(part, part)


def _loaded(module: Any, like: torch.Tensor, whole: torch.Tensor, part: Any = None, **dims: int) -> torch.Tensor:
    """`like` after vLLM's loader of `module` has put `whole`, or this rank's share of it, into its place there."""
    parameter = nn.Parameter(like.clone(), requires_grad=False)
    for name, value in dims.items():
        setattr(parameter, name, value)
    module.weight_loader(parameter, whole.to(like.dtype), *(() if part is None else (part,)))
    return parameter.data


def _own_copy(view: nn.Module, path: str) -> Any:
    """The module at `path`, it and all on the way to it replaced by shallow copies."""
    module: Any = view
    for name in path.split("."):
        child = module._modules[name]
        assert child is not None
        new = shallow_copy(child, copy.copy(child._modules))
        module._modules[name] = new
        module = new
    return module
