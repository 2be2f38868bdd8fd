"""The weights that a conversion has by its plan, made anew from the source's, to compare what was written with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..errors import UserError
from .agreement import WAY_OUT
from .plan import Plan
from .relax import as_matrix
from .source import SourceWeights
from .write import Pending

# How far LoRA factors may be from their relations: by SVD in float32 (13 eps were seen), and by rounding to the dtype
# that is stored (a third of its eps was seen).
SVD_ROUNDING = 64 * torch.finfo(torch.float32).eps
STORED_EPS = 1
# The greatest singular value of what LoRA factors leave out, over the smallest of what they hold: at most 1 by SVD, and
# 1.04 was seen by random projections.
LEFT_OUT = 1.25


def check_config(directory: Path, config: Any) -> None:
    """Raise UserError unless config.json in `directory`, read back, says in every field what `config` says."""
    pairs = [AutoConfig.from_pretrained(directory).to_dict(), config.to_dict()]
    found, wanted = (_flat({**fields, "_name_or_path": None}) for fields in pairs)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"verification failed: {name} of config.json, read back, is {found.get(name)!r}, not "
                f"{wanted.get(name)!r}; {WAY_OUT}"
            )


def _flat(fields: dict[str, Any], above: str = "") -> dict[str, Any]:
    """The fields, those of sections by their names with dots."""
    flat = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {f"{above}{name}": value}
    return flat


class Expected:
    """Weights by `plan` from those of the source, rounded to `cast` (None: to the source's own types) as they were on
    writing. layers: the name of the source's layer list, with a dot at its end."""

    def __init__(self, plan: Plan, weights: SourceWeights, layers: str, cast: torch.dtype | None):
        self.plan, self.weights, self.layers, self.cast = plan, weights, layers, cast

    def kept(self, name: str) -> torch.Tensor:
        """The source's tensor of that name."""
        tensor = self.weights.read(name)
        return tensor.to(self.cast) if self.cast else tensor

    def own(self, n: int, suffix: str, depth: int) -> torch.Tensor:
        """Parameter `suffix` that core layer n has for itself at `depth`."""
        return self.kept(f"{self.layers}{self.plan.stands_for[depth][n]}.{suffix}")

    def tied(self, part: str, n: int, suffix: str) -> torch.Tensor | None:
        """Parameter `suffix` of layer n of that part, at every depth. None where it started at random."""
        parents = [f"{self.layers}{parent}.{suffix}" for parent in self.plan.parents[part][n]]
        if len(parents) < 2:
            return self.kept(parents[0]) if parents else None
        mean = sum(self.weights.read(parent).float() for parent in parents) / len(parents)
        return torch.as_tensor(mean).to(self.cast or self.weights.dtype(parents[0]))


def check_tensors(written: SourceWeights, expected: Expected, pending: list[Pending], zero: bool) -> None:
    """Raise UserError unless every tensor of the checkpoint is, bit for bit, the one expected, and LoRA factors are
    those of what tying took away (with `zero`, of nothing).

    Tensors that no source has (routers, injections, what started at random) are made from `pending` again.
    """
    relaxation = written.config.relaxation or {"rank": {}, "own": []}
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
        for n in range(len(written.config.core)):
            _check_factors(written, expected, n, path, zero)


def check_equal(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Raise UserError unless tensor `name`, read back, is bit for bit the one that was to be written."""
    if got.dtype != want.dtype or got.shape != want.shape:
        raise _wrong(name, f"is {got.dtype} {list(got.shape)}, not {want.dtype} {list(want.shape)}")
    if not torch.equal(got, want):
        most = (got.double() - want.double()).abs().max().item()
        raise _wrong(name, f"differs in {(got != want).sum():,} of {got.numel():,} values, by up to {most:.3g}")


def _check_factors(written: SourceWeights, expected: Expected, n: int, path: str, zero: bool) -> None:
    """Raise UserError unless, at every depth, A has orthonormal rows, B = dW A^T, and what B A leaves out is smaller
    than each part that it holds, dW being what tying took from module `path` of core layer n: B A is then the best
    approximation of dW. With `zero`, unless B = 0."""
    name, transposed = f"relaxation.{n}.{path}", written.is_transposed(f"core.{n}.{path}")
    tied = as_matrix(written.read(f"core.{n}.{path}.weight"), transposed)
    factors = [written.read(f"{name}.lora_{factor}") for factor in "AB"]
    rounding = SVD_ROUNDING + STORED_EPS * torch.finfo(factors[0].dtype).eps
    magnitude = f"{name}.dora_magnitude"
    lengths = written.read(magnitude).float() if magnitude in written.names() else None
    for depth, (a, b) in enumerate(zip(*(factor.float() for factor in factors), strict=True)):
        lost = f"{expected.layers}{expected.plan.stands_for[depth][n]}.{path}.weight"
        if zero and b.any():
            raise _wrong(f"{name}.lora_B", f"is not zero at depth {depth}")
        if not zero:
            change = as_matrix(expected.weights.read(lost), transposed) - tied
            if not (off := (a @ a.T - torch.eye(len(a))).abs().max().item()) <= rounding:
                raise _wrong(f"{name}.lora_A", f"has rows that are not orthonormal at depth {depth}, by {off:.3g}")
            scale = b.square().sum(0).max().sqrt().item()  # the greatest singular value
            if not (off := (b - change @ a.T).abs().max().item()) <= rounding * scale:
                raise _wrong(f"{name}.lora_B", f"is not what tying took from {lost}, by {off:.3g} of {scale:.3g}")
            left, least = greatest_singular_value(change - b @ a), b.square().sum(0).min().sqrt().item()
            if not left <= LEFT_OUT * least + rounding * len(a) ** 0.5 * scale:
                what = f"holds parts of {least:.3g} at depth {depth} and leaves out one of {left:.3g}"
                raise _wrong(f"{name}.lora_A", f"{what}: it is not the best approximation of what tying took")
        if lengths is not None:
            want = (tied + b @ a).norm(dim=1)
            if not (off := (lengths[depth] - want).abs().max().item()) <= rounding * want.max().item():
                raise _wrong(magnitude, f"is not the length of the rows at depth {depth}, by {off:.3g}")


def greatest_singular_value(matrix: torch.Tensor, steps: int = 8) -> float:
    """The greatest singular value of `matrix` by power iterations, which come near to it from below."""
    row = matrix[matrix.square().sum(1).argmax()]
    for _ in range(steps):
        row = matrix.T @ (matrix @ torch.nn.functional.normalize(row, dim=0))
    return (matrix @ torch.nn.functional.normalize(row, dim=0)).norm().item()


def _wrong(name: str, what: str) -> UserError:
    return UserError(f"verification failed: tensor {name}, read back, {what}; {WAY_OUT}")
