"""Agreement of two ways to compute the same logits: what is rounding, and what is a fault."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from ..errors import UserError
from .double import Double

EXACT = 1e-10  # of the greatest logit, in float64: rounding was seen to do 1e-14 of it
ROUNDINGS = 4  # of what rounding does to the reference, in the dtype of the checkpoint: it was seen to do 1.6
WAY_OUT = "nothing was written (--no-verify writes it unchecked)"


class Logits(NamedTuple):
    """Logits [N, V] computed in two ways, and what is compared."""

    what: str
    got: torch.Tensor
    want: torch.Tensor


def agreement(compute: Callable[[torch.dtype], Iterable[Logits]], dtype: torch.dtype) -> dict[str, float]:
    """Largest difference of the logits that `compute(dtype)` gives, by the dtypes in which they were compared.

    Equal bit for bit in `dtype`, the two ways are one. Else they are computed in float64 as well, where rounding is far
    smaller than what any fault does: there they may differ by EXACT of the greatest logit. And in `dtype` a token's
    logits may differ, in the median, by ROUNDINGS of what the second way differs from itself in float64: a few tokens
    may differ by more, as where a router's choice was a tie. Raises UserError where they differ by more.
    """
    own = list(compute(dtype))
    found = {_name(dtype): max(_greatest(pair.got, pair.want) for pair in own)}
    if all(torch.equal(pair.got, pair.want) for pair in own):
        return found
    exact = in_double(compute)
    for near, far in zip(own, exact, strict=True):
        differ, rounding = _typical(near.got, near.want), _typical(near.want, far.want)
        if not differ <= ROUNDINGS * rounding:
            raise UserError(
                f"verification failed: {near.what} have logits that differ by {differ:.3g} in {_name(dtype)} (median "
                f"of the tokens), where rounding explains {ROUNDINGS} times {rounding:.3g}; {WAY_OUT}"
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
                f"verification failed: {pair.what} have logits that differ by {differ:.3g}, both computed in float64 "
                f"from the same weights; rounding explains {EXACT * most:.1g}; {WAY_OUT}"
            )
    return found


def decisive(found: dict[str, float]) -> float:
    """The largest difference in the widest dtype of those in which logits were compared."""
    return found.get("float64", next(iter(found.values())))


def shown(found: dict[str, float]) -> str:
    """The differences `found` in words."""
    return "max |dlogit| " + ", ".join(f"{value:.3g} ({dtype})" for dtype, value in found.items())


def _greatest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item() if a.dtype == torch.float64 else (a.float() - b.float()).abs().max().item()


def _typical(a: torch.Tensor, b: torch.Tensor) -> float:
    """The median over tokens of the largest difference of a token's logits [N, V]."""
    return (a.double() - b.double()).abs().amax(1).median().item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
