"""Relaxation at conversion: matrices that get a LoRA, parameters that every depth keeps, and the values of both."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..model.relaxation import matrix, relaxed_matrix, row_norms
from .recipe import Lora
from .source import SourceWeights

# Names of projections in the architectures -> targets; fused ones serve several.
PROJECTIONS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "query_key_value": "q k v", "qkv_proj": "q k v", "Wqkv": "q k v",
    "c_attn": "q k v", "o_proj": "o", "out_proj": "o", "dense": "o", "gate_proj": "gate", "gate_up_proj": "gate up",
    "up_proj": "up", "fc1": "up", "fc_in": "up", "c_fc": "up", "dense_h_to_4h": "up", "down_proj": "down",
    "fc2": "down", "fc_out": "down", "dense_4h_to_h": "down", "q_a_proj": "q", "q_b_proj": "q",
    "kv_a_proj_with_mqa": "k v", "kv_b_proj": "k v", "kv_proj": "k v", "in_proj_qkv": "q k v", "in_proj_qkvz": "q k v",
    "w1": "gate", "w3": "up", "w2": "down", "input_linear": "gate up", "output_linear": "down", "Wi": "gate up",
    "Wq": "q", "Wk": "k", "Wv": "v",
}  # fmt: skip
EXACT_UP_TO = 1024  # the smaller side of a matrix, above which its SVD is randomized
OVERSAMPLED = 16  # directions of a randomized SVD beyond its rank
ITERATIONS = 4  # power iterations of a randomized SVD
ROWS = 1024  # of a matrix whose error is summed at a time


def ranks(core: list[nn.Module], lora: Lora) -> dict[str, int]:
    """The rank of the LoRA of each linear module that gets one, by its name in the layers `core`, all of which have it.

    Raises UserError for a target that not all of them have, and for a rank above that of a matrix.
    """
    wanted, chosen = lora.ranks(), dict[str, int]()
    linear = [projections(layer) for layer in core]
    common = {name: targets for name, (_, targets) in linear[0].items() if all(name in other for other in linear)}
    for name, targets in common.items():
        rank = max((wanted[target] for target in targets if target in wanted), default=0)
        for module in (layer[name][0] for layer in linear):
            if rank > min(matrix(module).shape):
                shape = list(module.weight.shape)
                raise UserError(f"lora.rank={rank} is above the rank of {name}, whose shape is {shape}")
        if rank:
            chosen[name] = rank
    found = sorted({target for targets in common.values() for target in targets})
    for target in wanted:
        if target not in found and (lora.targets or isinstance(lora.rank, dict)):
            choices = f"choose from {', '.join(found)}" if found else "these have none in common"
            raise UserError(f"lora target {target!r}: not every layer of the core has such a matrix; {choices}")
    if not chosen:
        raise UserError(f"lora: none of the matrices {', '.join(wanted)} is in every layer of the core")
    return chosen


def projections(layer: nn.Module) -> dict[str, tuple[nn.Linear | Conv1D, list[str]]]:
    """Linear modules of `layer` by name, each with the targets that it serves."""
    linear: dict[str, tuple[nn.Linear | Conv1D, list[str]]] = {}
    for name, module in layer.named_modules():
        last = name.rpartition(".")[2]
        both = last in ("c_proj", "Wo")  # names of attention's output and of the MLP's
        targets = ["o" if "attn" in name else "down"] if both else PROJECTIONS.get(last, "").split()
        if isinstance(module, nn.Linear | Conv1D) and targets:
            linear[name] = (module, targets)
    return linear


def own_parameters(weights: SourceWeights, layers: str, stands_for: list[list[int]]) -> list[str]:
    """The parameters of at most one dimension (norms, biases) that differ between layers that are tied, by name.

    layers: the name of the source's layer list, with a dot at its end. Parameters that only some layers of the core
    have stay tied, and so do buffers.
    """
    present = set(weights.names())
    tied = [sorted({depth[n] for depth in stands_for}) for n in range(len(stands_for[0]))]
    first = f"{layers}{tied[0][0]}."
    own: list[str] = []
    for name in weights.names():
        suffix = name.removeprefix(first)
        everywhere = all(f"{layers}{layer}.{suffix}" in present for group in tied for layer in group)
        if suffix == name or len(weights.shape(name)) > 1 or not everywhere or not weights.is_parameter(name):
            continue
        values = [[weights.read(f"{layers}{layer}.{suffix}") for layer in group] for group in tied]
        if any(not torch.equal(group[0], other) for group in values for other in group[1:]):
            own.append(suffix)
    return own


@contextmanager
def one_thread() -> Generator[None]:
    """Within it torch computes in one thread.

    LAPACK gains little by more. Where another process holds a core, its threads wait for each other at every step and
    take several times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class LowRank:
    """LoRA factors of one matrix of one tied layer, for every depth.

    init: `svd` (B A is a truncated SVD of W_source - W_tied) or `zero` (B = 0).
    tied, replaced: matrices [out, in] in float32, the tied one and the source's that it replaces at a depth.
    error: with `svd`, once the factors are made, ||W_source - W_tied - B A|| / ||W_source - W_tied|| over all depths.

    The factors are made when the first of them is taken, on the device of `tied`.
    """

    rank: int
    depths: int
    init: str
    dora: bool
    seed: int
    tied: Callable[[], torch.Tensor]
    replaced: Callable[[int], torch.Tensor]
    error: float | None = None
    _made: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    def take(self, name: str) -> torch.Tensor:
        """lora_A [depths, r, in], lora_B [depths, out, r] or dora_magnitude [depths, out]; each may be taken once."""
        if name not in self._made:
            self._make()
        return self._made.pop(name)

    def measured(self) -> float | None:
        """`error` as it is now."""
        return self.error

    @one_thread()
    def _make(self) -> None:
        """Make all factors, and measure `error`. Their bits do not depend on the number of threads."""
        tied = self.tied()
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        factors: list[tuple[torch.Tensor, ...]] = []
        left = whole = 0.0
        for depth in range(self.depths):
            if self.init == "zero":
                a = torch.randn(self.rank, tied.shape[1], generator=generator).to(tied.device) * tied.shape[1] ** -0.5
                b = tied.new_zeros(tied.shape[0], self.rank)
            else:
                change = self.replaced(depth) - tied
                b, a = truncated_svd(change, self.rank, self.seed + depth)
                for rows, part in zip(change.split(ROWS), b.split(ROWS), strict=True):
                    left += (rows - part @ a).square().sum().item()
                    whole += rows.square().sum().item()
            factors.append((a, b, row_norms(tied, a, b) if self.dora else tied.new_empty(0)))
        if self.init == "svd":
            self.error = (left / whole) ** 0.5 if whole else 0.0
        names = ("lora_A", "lora_B", "dora_magnitude")[: 3 if self.dora else 2]
        self._made = {name: torch.stack([f[i] for f in factors]) for i, name in enumerate(names)}


def truncated_svd(change: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B [out, r] = U_r S_r = dW V_r and A [r, in] = V_r^T of dW = `change` [out, in] (arXiv 2410.20672, section 2.3).

    The scale of the LoRA is exactly 1. Large matrices: `torch.svd_lowrank`, randomized by `seed` (Halko, Martinsson,
    Tropp 2011, algorithms 4.4 and 5.1). The seeds of torch are left as they are.
    """
    if min(change.shape) <= EXACT_UP_TO or 4 * rank > min(change.shape):
        a = torch.linalg.svd(change, full_matrices=False)[2][:rank]
        return change @ a.T, a
    with torch.random.fork_rng([change.device] if change.is_cuda else []):
        torch.manual_seed(seed % 2**63)
        a = torch.svd_lowrank(change, rank + OVERSAMPLED, ITERATIONS)[2][:, :rank].T.contiguous()
    return change @ a.T, a


def as_matrix(values: torch.Tensor, transposed: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix [out, in] in `dtype` of a weight that stands on disk so, or `transposed`, as [in, out]."""
    return (values.T if transposed else values).to(dtype)


def merged(
    weights: SourceWeights, n: int, path: str, depth: int, weight: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The `weight` of module `path` of core layer n with its LoRA at `depth`, computed in `dtype`.

    weights: those of the recurrent-depth checkpoint, which hold the LoRA. The layout is that of `weight`.
    """
    name = f"relaxation.{n}.{path}"
    a, b = (weights.read(f"{name}.lora_{factor}")[depth].to(dtype) for factor in "AB")
    transposed = weights.is_transposed(f"core.{n}.{path}")
    magnitude = f"{name}.dora_magnitude"
    norms = weights.read(magnitude)[depth].to(dtype) if magnitude in weights.names() else None
    result = relaxed_matrix(weight.T if transposed else weight, a, b, norms)
    return result.T if transposed else result


def stored_at(weights: SourceWeights, part: str, n: int, suffix: str) -> tuple[str, bool]:
    """The name of the tensor that gives parameter `suffix` of layer n of `part`, and whether a LoRA is merged into it.

    A name in `relaxation.` is of a tensor that stands once per depth.
    """
    relaxation = weights.recurrent_config.relaxation
    if part == "core" and relaxation:
        if suffix in relaxation["own"]:
            return f"relaxation.{n}.{suffix}", False
        return f"core.{n}.{suffix}", suffix.removesuffix(".weight") in relaxation["rank"]
    return f"{part}.{n}.{suffix}", False


def at_depth(
    weights: SourceWeights, part: str, n: int, suffix: str, depth: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Parameter `suffix` of layer n of `part` of a recurrent-depth checkpoint at `depth`; with a LoRA, in `dtype`."""
    name, has_lora = stored_at(weights, part, n, suffix)
    tensor = weights.read(name)
    if relaxation := weights.recurrent_config.relaxation:
        depth = min(depth, relaxation["depths"] - 1)
    if name.startswith("relaxation."):
        return tensor[depth]
    return merged(weights, n, suffix.removesuffix(".weight"), depth, tensor, dtype) if has_lora else tensor
