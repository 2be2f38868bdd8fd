"""The weights of a conversion by its plan, made anew from the source's, to compare the written ones with."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..checkpoint import flat
from ..errors import UserError
from ..load import read_config
from ..model.relaxation import relaxed_matrix
from .agreement import WAY_OUT
from .pending import Pending
from .plan import Plan
from .relax import as_matrix
from .source import SourceWeights

SVD_ROUNDING = 64 * torch.finfo(torch.float32).eps  # error of LoRA factors by SVD in float32: 13 eps were seen
STORED_EPS = 1  # error by rounding to the stored dtype, in its eps: a third was seen
# Greatest singular value of dW - B A over the smallest of B A: at most 1 by SVD; 1.04 was seen with a randomized one.
LEFT_OUT = 1.25


def check_config(directory: Path, config: PreTrainedConfig) -> None:
    """Raise UserError unless config.json in `directory`, read back, equals `config` in every field."""
    pairs = [read_config(directory).to_dict(), config.to_dict()]
    found, wanted = (flat({**fields, "_name_or_path": None, "auto_map": None}) for fields in pairs)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"verification failed: {name} of config.json, read back, is {found.get(name)!r}, not "
                f"{wanted.get(name)!r}; {WAY_OUT}"
            )


class Expected:
    """Weights by `plan` from those of the source, rounded as on writing.

    layers: the name of the source's layer list, with a dot at its end. dtype: the type of the output; None for the
    source's own types.
    """

    def __init__(self, plan: Plan, weights: SourceWeights, layers: str, dtype: torch.dtype | None):
        self.plan, self.weights, self.layers, self.dtype = plan, weights, layers, dtype

    def kept(self, name: str) -> torch.Tensor:
        """The source's tensor of that name."""
        tensor = self.weights.read(name)
        return tensor.to(self.dtype) if self.dtype else tensor

    def own(self, n: int, suffix: str, depth: int) -> torch.Tensor:
        """Parameter `suffix` of core layer n, which it has for itself at `depth`."""
        return self.kept(f"{self.layers}{self.plan.stands_for[depth][n]}.{suffix}")

    def tied(self, part: str, n: int, suffix: str) -> torch.Tensor | None:
        """Parameter `suffix` of layer n of `part`, the same at every depth; None for a layer that started at random."""
        parents = [f"{self.layers}{parent}.{suffix}" for parent in self.plan.parents[part][n]]
        if len(parents) < 2:
            return self.kept(parents[0]) if parents else None
        mean = sum(self.weights.read(parent).float() for parent in parents) / len(parents)
        return torch.as_tensor(mean).to(self.dtype or self.weights.dtype(parents[0]))


def check_tensors(written: SourceWeights, expected: Expected, pending: list[Pending], zero: bool) -> None:
    """Raise UserError unless every tensor of the checkpoint is the expected one, bit for bit.

    LoRA factors are to be the truncated SVD of W_source - W_tied; with `zero`, B is to be zero. Tensors that no source
    has (routers, injections, random layers) are made from `pending` again.
    """
    relaxation = written.recurrent_config.relaxation or {"rank": {}, "own": []}
    made = {tensor.name: tensor for tensor in pending}
    for name in written.names():
        head, _, rest = name.partition(".")
        n, _, suffix = rest.partition(".")
        want = None
        if head == "source":
            want = expected.kept(rest)
        elif head in expected.plan.parents:
            want = expected.tied(head, int(n), suffix)
        elif head == "relaxation" and suffix in relaxation["own"]:
            each = [expected.own(int(n), suffix, depth) for depth in range(relaxation["depths"])]
            want = torch.stack(each).to(each[0].dtype)
        elif head == "relaxation" and not zero:
            continue
        check_equal(name, written.read(name), made[name].make().to(made[name].dtype) if want is None else want)
    for path in relaxation["rank"]:
        for n in range(len(written.recurrent_config.core)):
            _check_factors(written, expected, n, path, zero)


def check_equal(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Raise UserError unless tensor `name`, read back as `got`, equals `want` in type, shape and every bit."""
    if got.dtype != want.dtype or got.shape != want.shape:
        raise _wrong(name, f"is {got.dtype} {list(got.shape)}, not {want.dtype} {list(want.shape)}")
    if not torch.equal(got, want):
        most = (got.double() - want.double()).abs().max().item()
        raise _wrong(name, f"differs in {(got != want).sum():,} of {got.numel():,} values, by up to {most:.3g}")


def _check_factors(written: SourceWeights, expected: Expected, n: int, path: str, zero: bool) -> None:
    """Raise UserError unless the LoRA of module `path` of core layer n is right at every depth (see `_check_svd`).

    With `zero`, B is to be zero. With DoRA, magnitudes are to be the norms of the rows of W_tied + B A.
    """
    name, transposed = f"relaxation.{n}.{path}", written.is_transposed(f"core.{n}.{path}")
    tied = as_matrix(written.read(f"core.{n}.{path}.weight"), transposed)
    factors = [written.read(f"{name}.lora_{factor}") for factor in "AB"]
    rounding = SVD_ROUNDING + STORED_EPS * torch.finfo(factors[0].dtype).eps
    magnitude = f"{name}.dora_magnitude"
    norms = written.read(magnitude).float() if magnitude in written.names() else None
    for depth, (a, b) in enumerate(zip(*(factor.float() for factor in factors), strict=True)):
        if not zero:
            source = f"{expected.layers}{expected.plan.stands_for[depth][n]}.{path}.weight"
            change = [as_matrix(expected.weights.read(source), transposed) - tied]
            _check_svd(name, source, depth, a, b, change.pop(), rounding)  # nothing here holds it any longer
        elif b.any():
            raise _wrong(f"{name}.lora_B", f"is not zero at depth {depth}")
        if norms is not None:
            want = relaxed_matrix(tied, a, b).norm(dim=1)
            if not (off := (norms[depth] - want).abs().max().item()) <= rounding * want.max().item():
                raise _wrong(magnitude, f"is not the norm of the rows at depth {depth}, by {off:.3g}")


def _check_svd(
    name: str, source: str, depth: int, a: torch.Tensor, b: torch.Tensor, change: torch.Tensor, rounding: float
) -> None:
    """Raise UserError unless B A is the best approximation of rank r of dW = `change` [out, in].

    That is so where A [r, in] has orthonormal rows, B [out, r] = dW A^T, and no singular value of dW - B A exceeds one
    of B A. `change` is overwritten: it is one of the greatest matrices.
    """
    if not (off := (a @ a.T - torch.eye(len(a))).abs().max().item()) <= rounding:
        raise _wrong(f"{name}.lora_A", f"has rows that are not orthonormal at depth {depth}, by {off:.3g}")
    scale = b.square().sum(0).max().sqrt().item()  # the greatest singular value of B A
    if not (off := (b - change @ a.T).abs().max().item()) <= rounding * scale:
        raise _wrong(f"{name}.lora_B", f"is not that of {source} less the tied matrix, by {off:.3g} of {scale:.3g}")
    left, least = greatest_singular_value(change.addmm_(b, a, alpha=-1)), b.square().sum(0).min().sqrt().item()
    if not left <= LEFT_OUT * least + rounding * len(a) ** 0.5 * scale:
        parts = f"holds a part of {least:.3g} at depth {depth} and leaves out one of {left:.3g}"
        raise _wrong(f"{name}.lora_A", f"{parts}: it is not the best approximation")


def greatest_singular_value(matrix: torch.Tensor, steps: int = 8) -> float:
    """The greatest singular value of `matrix` [M, N], from below, by `steps` power iterations."""
    row = matrix[torch.linalg.vector_norm(matrix, dim=1).argmax()]
    for _ in range(steps):
        row = matrix.T @ (matrix @ torch.nn.functional.normalize(row, dim=0))
    return (matrix @ torch.nn.functional.normalize(row, dim=0)).norm().item()


def _wrong(name: str, fault: str) -> UserError:
    """The error for tensor `name` with a fault, a verb and more."""
    return UserError(f"verification failed: tensor {name}, read back, {fault}; {WAY_OUT}")
