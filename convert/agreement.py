"""Agreement of two ways to compute the same logits: differences are rounding, or a fault."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from ..errors import UserError
from .double import Double
from .dtypes import dtype_name

EXACT = 1e-10  # share of the greatest logit, in float64: rounding was seen to do 1e-14 of it
ROUNDINGS = 4  # times the reference's own rounding, in the dtype of the checkpoint: 1.6 was seen
WAY_OUT = "nothing was written (--no-verify writes it unchecked)"


class Logits(NamedTuple):
    """Logits [N, V] computed in two ways. title: both ways in words, for error lines."""

    title: str
    got: torch.Tensor
    want: torch.Tensor


def agreement(compute: Callable[[torch.dtype], Iterable[Logits]], dtype: torch.dtype) -> dict[str, float]:
    """Largest difference of the logits that `compute(dtype)` gives, by the names of the dtypes that were compared.

    Two ways that are equal bit for bit in `dtype` are one. Others are computed in float64 too, where rounding is far
    smaller than any fault: there they may differ by EXACT of the greatest logit. In `dtype` a token's logits may
    differ, in the median over tokens, by ROUNDINGS times the rounding of `want`, its difference from itself in float64.
    A few tokens may differ by more, as where a router's choice was a tie. Raises UserError for larger differences.
    """
    near = list(compute(dtype))
    found = {dtype_name(dtype): max(_greatest(pair.got, pair.want) for pair in near)}
    if all(torch.equal(pair.got, pair.want) for pair in near):
        return found
    exact = in_double(compute)
    for pair, far in zip(near, exact, strict=True):
        differ, rounding = _typical(pair.got, pair.want), _typical(pair.want, far.want)
        if not differ <= ROUNDINGS * rounding:
            raise UserError(
                f"verification failed: {pair.title} have logits that differ by {differ:.3g} in {dtype_name(dtype)} "
                f"(median of the tokens), where rounding explains {ROUNDINGS} times {rounding:.3g}; {WAY_OUT}"
            )
    return {**found, "float64": max(_greatest(pair.got, pair.want) for pair in exact)}


def in_double(compute: Callable[[torch.dtype], Iterable[Logits]]) -> list[Logits]:
    """The logits that `compute` gives in float64. Raises UserError for a difference beyond rounding there."""
    with Double():
        found = list(compute(torch.float64))
    for pair in found:
        most = pair.want.abs().max().item()
        if not (differ := _greatest(pair.got, pair.want)) <= EXACT * most:
            raise UserError(
                f"verification failed: {pair.title} have logits that differ by {differ:.3g}, both computed in float64 "
                f"from the same weights; rounding explains {EXACT * most:.1g}; {WAY_OUT}"
            )
    return found


def decisive(found: dict[str, float]) -> float:
    """The largest difference in the widest dtype of those in which logits were compared."""
    return found.get("float64", next(iter(found.values())))


def in_words(found: dict[str, float]) -> str:
    """The differences `found`, as "max |dlogit| 1e-05 (float32), 1e-14 (float64)"."""
    return "max |dlogit| " + ", ".join(f"{value:.3g} ({dtype})" for dtype, value in found.items())


def _greatest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two tensors, at least in float32."""
    return (a - b).abs().max().item() if a.dtype == torch.float64 else (a.float() - b.float()).abs().max().item()


def _typical(a: torch.Tensor, b: torch.Tensor) -> float:
    """The median over tokens of the largest difference of a token's logits [N, V]."""
    return (a.double() - b.double()).abs().amax(1).median().item()
