"""Relaxation at conversion: which matrices get a LoRA, which parameters every depth keeps, and how both start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..model.relaxation import matrix
from .recipe import Lora
from .source import SourceWeights

# What architectures call the projections; fused ones serve several targets.
PROJECTIONS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "query_key_value": "q k v", "qkv_proj": "q k v", "Wqkv": "q k v",
    "c_attn": "q k v", "o_proj": "o", "out_proj": "o", "dense": "o", "gate_proj": "gate", "gate_up_proj": "gate up",
    "up_proj": "up", "fc1": "up", "fc_in": "up", "c_fc": "up", "dense_h_to_4h": "up", "down_proj": "down",
    "fc2": "down", "fc_out": "down", "dense_4h_to_h": "down",
}  # fmt: skip
EXACT_UP_TO = 1024  # the smaller side of a matrix, above which its singular values are found by random projections


def ranks(layer: nn.Module, lora: Lora) -> dict[str, int]:
    """Linear modules of `layer`, by name, that get a LoRA, and its rank.

    Raises UserError for a target that the layer does not have, and for a rank above that of the matrix.
    """
    wanted, chosen = lora.ranks(), {}
    linear = projections(layer)
    for name, (module, targets) in linear.items():
        rank = max((wanted[target] for target in targets if target in wanted), default=0)
        most = min(matrix(module).shape)
        if rank > most:
            raise UserError(f"lora.rank={rank} is above the rank of {name}, whose shape is {list(module.weight.shape)}")
        if rank:
            chosen[name] = rank
    found = {target for _, targets in linear.values() for target in targets}
    for target in wanted:
        if target not in found and (lora.targets or isinstance(lora.rank, dict)):
            raise UserError(
                f"lora target {target!r}: these layers have no such matrix; choose from {', '.join(sorted(found))}"
            )
    if not chosen:
        raise UserError(f"lora: these layers have none of {', '.join(wanted)}")
    return chosen


def projections(layer: nn.Module) -> dict[str, tuple[Any, list[str]]]:
    """Linear modules of `layer` by name, each with the targets that it serves."""
    linear = {}
    for name, module in layer.named_modules():
        last = name.rpartition(".")[2]
        targets = ["o" if "attn" in name else "down"] if last == "c_proj" else PROJECTIONS.get(last, "").split()
        if isinstance(module, nn.Linear | Conv1D) and targets:
            linear[name] = (module, targets)
    return linear


def own_parameters(weights: SourceWeights, layers: str, stands_for: list[list[int]]) -> list[str]:
    """Norms, biases and other parameters of at most one dimension that differ between the layers that are tied. Those
    that only some layers of the core have stay tied."""
    present = set(weights.names())
    tied = [sorted({depth[n] for depth in stands_for}) for n in range(len(stands_for[0]))]
    first = f"{layers}{tied[0][0]}."
    own = []
    for name in weights.names():
        suffix = name.removeprefix(first)
        everywhere = all(f"{layers}{layer}.{suffix}" in present for group in tied for layer in group)
        if suffix == name or len(weights.shape(name)) > 1 or not everywhere:
            continue
        values = [[weights.read(f"{layers}{layer}.{suffix}") for layer in group] for group in tied]
        if any(not torch.equal(group[0], other) for group in values for other in group[1:]):
            own.append(suffix)
    return own


@dataclass
class LowRank:
    """LoRA factors of one matrix of one tied layer, for every depth: of what each depth lost, or of nothing.

    `tied` and `lost` give matrices [out, in] in float32: the tied one, and the one that it replaced at a depth. Made
    once, when the first of the factors is asked for; `error` then is the share of what was lost that the factors do not
    give back, ||lost - tied - B A|| / ||lost - tied|| over all depths.
    """

    rank: int
    depths: int
    init: str
    dora: bool
    seed: int
    tied: Callable[[], torch.Tensor]
    lost: Callable[[int], torch.Tensor]
    error: float | None = None
    _made: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, name: str) -> torch.Tensor:
        """lora_A [depths, r, in], lora_B [depths, out, r] or dora_magnitude [depths, out]; each is handed out once."""
        if name not in self._made:
            self._make()
        return self._made.pop(name)

    def _make(self) -> None:
        tied = self.tied()
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        factors: list[tuple[torch.Tensor, ...]] = []
        left = whole = 0.0
        for depth in range(self.depths):
            if self.init == "zero":
                a = torch.randn(self.rank, tied.shape[1], generator=generator) * tied.shape[1] ** -0.5
                b = torch.zeros(tied.shape[0], self.rank)
            else:
                change = self.lost(depth) - tied
                b, a = truncated_svd(change, self.rank, generator)
                left += (change - b @ a).square().sum().item()
                whole += change.square().sum().item()
            length = torch.linalg.vector_norm(tied + b @ a, dim=1) if self.dora else tied.new_empty(0)
            factors.append((a, b, length))
        if self.init == "svd":
            self.error = (left / whole) ** 0.5 if whole else 0.0
        names = ("lora_A", "lora_B", "dora_magnitude")[: 3 if self.dora else 2]
        self._made = {name: torch.stack([f[i] for f in factors]) for i, name in enumerate(names)}


def truncated_svd(change: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """B [out, r] = U_r S_r = dW V_r and A [r, in] = V_r^T of dW = `change` [out, in]: the scale is exactly 1 (arXiv
    2410.20672, section 2.3).

    Large matrices: randomized (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1), with 16 more directions than
    `rank` and four power iterations.
    """
    if min(change.shape) <= EXACT_UP_TO or 4 * rank > min(change.shape):
        with one_thread():
            a = torch.linalg.svd(change, full_matrices=False)[2][:rank]
        return change @ a.T, a
    basis = change @ torch.randn(change.shape[1], rank + 16, generator=generator)
    for _ in range(4):
        basis = change @ torch.linalg.qr(change.T @ torch.linalg.qr(basis).Q).Q
    basis = torch.linalg.qr(basis).Q
    a = torch.linalg.svd(basis.T @ change, full_matrices=False)[2][:rank]
    return change @ a.T, a


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch computes in one thread. LAPACK gains little by more, and where another process holds a core,
    threads that wait for each other at every step take several times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_matrix(values: torch.Tensor, transposed: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A weight as the matrix [out, in] in `dtype`, which may stand on disk as [in, out]."""
    return (values.T if transposed else values).to(dtype)


def merged(
    weights: SourceWeights, n: int, path: str, depth: int, matrix: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The weight `matrix` of module `path` of core layer n, as it stands on disk, with its LoRA at `depth`, computed
    in `dtype`."""
    a, b = (weights.read(f"relaxation.{n}.{path}.lora_{factor}")[depth].to(dtype) for factor in "AB")
    transposed = weights.is_transposed(f"core.{n}.{path}")
    result = as_matrix(matrix, transposed, dtype) + b @ a
    magnitude = f"relaxation.{n}.{path}.dora_magnitude"
    if magnitude in weights.names():
        result = result * (weights.read(magnitude)[depth].to(dtype) / result.norm(dim=1))[:, None]
    return result.T if transposed else result


def at_depth(
    weights: SourceWeights, part: str, n: int, suffix: str, depth: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Parameter `suffix` of layer n of that part of a recurrent-depth checkpoint, as it is at `depth`; with its LoRA,
    in `dtype`."""
    relaxation = weights.config.relaxation
    if part != "core" or not relaxation:
        return weights.read(f"{part}.{n}.{suffix}")
    depth, path = min(depth, relaxation["depths"] - 1), suffix.removesuffix(".weight")
    if suffix in relaxation["own"]:
        return weights.read(f"relaxation.{n}.{suffix}")[depth]
    tied = weights.read(f"core.{n}.{suffix}")
    return merged(weights, n, path, depth, tied, dtype) if path in relaxation["rank"] else tied
