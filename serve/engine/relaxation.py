"""Relaxation of rows at mixed depths: a hook takes LoRA, norms and biases of each row's own depth.

Shapes: N rows. Depths are counted from 0: [N], or [1] of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...model.relaxation import Factors, dora_scale, lora_by_depth, pack_depths, rescale

Depths = Callable[[], Tensor]

_library = torch.library.Library("loopwise", "FRAGMENT")
_library.define("add_product(Tensor(a!) out, Tensor x, Tensor matrix, int start) -> ()")


def add_product(out: Tensor, x: Tensor, matrix: Tensor, start: int = 0) -> None:
    """Add x [..., in] times `matrix` [width, in] to columns `start` and after of `out` [..., out], in place.

    A second tensor of the size of `out` would cost memory and time: many prompts have many rows.
    """
    torch.ops.loopwise.add_product(out.flatten(0, -2), x.flatten(0, -2), matrix, start)


def _add_product(out: Tensor, x: Tensor, matrix: Tensor, start: int) -> None:
    out.narrow(1, start, len(matrix)).addmm_(x, matrix.T)


def _add_nothing(out: Tensor, x: Tensor, matrix: Tensor, start: int) -> None:
    """Shapes of `_add_product`, for torch.compile."""


_library.impl("add_product", _add_product, "CompositeExplicitAutograd")
torch.library.register_fake("loopwise::add_product", _add_nothing, lib=_library)


def add_lora(
    out: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    depth: int | Tensor,
    start: int = 0,
    total: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Add B_d (A_d x) to columns `start` and after of `out` [..., out], in place; all rows x [..., in] are at depth d.

    a [depths, r, in], b [depths, width, r].   depth: a number, or a tensor [1].   total: sums A x over ranks that share
    the input.
    """
    a, b = (each[depth] if isinstance(depth, int) else each.index_select(0, depth)[0] for each in (a, b))
    inner = nn.functional.linear(x, a)
    add_product(out, inner if total is None else total(inner), b, start)


class RowFactors:
    """LoRA of one linear module, for rows [..., N, in] at their own depths, or all at one, such as a prompt's."""

    def __init__(self, a: Tensor, b: Tensor, depths: Depths):
        """a [depths, r, in], b [depths, out, r]."""
        self.a, self.b, self.depths, self.of_rows = a, b, len(a), depths
        down, up = (matrix.contiguous() for matrix in pack_depths(a, b))
        self.down = partial(nn.functional.linear, weight=down)
        self.ups = [(len(down), partial(nn.functional.linear, weight=up))]
        self.column_depth = torch.arange(self.depths, device=a.device).repeat_interleave(a.shape[1])

    def __call__(self, out: Tensor, x: Tensor) -> Tensor:
        """The module's output `out` [..., N, out] for x [..., N, in], with the LoRA added; it may be overwritten."""
        depth = self.of_rows().clamp(max=self.depths - 1)
        if len(depth) == 1:
            add_lora(out, x, self.a, self.b, depth)
            return out
        return out + lora_by_depth(x, self.down, self.ups, depth, self.column_depth)[0]


def relax_linear(
    linear: Any, factors: Factors, depths: Depths, row: Callable[[Tensor], Tensor], biases: Tensor | None = None
) -> None:
    """Add the LoRA `factors` to the output of `linear`, by a hook.

    row: its weight -> [out, in].   biases [depths, out]: its biases, if each depth has one of its own.
    """
    change = RowFactors(factors.lora_A.detach(), factors.lora_B.detach(), depths)
    scale = None
    if factors.dora_magnitude is not None:  # [depths, out]
        a, b, magnitude = (value.detach() for value in (factors.lora_A, factors.lora_B, factors.dora_magnitude))
        scale = dora_scale(row(linear.weight).detach(), a, b, magnitude)

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        out = change(out, args[0])
        if scale is None:
            return out
        of = depths().clamp(max=len(scale) - 1)
        return rescale(out, scale[of], linear.bias if biases is None else biases[of])

    linear.register_forward_hook(hook)


def by_depth(module: nn.Module, per_depth: dict[str, Tensor], depths: Depths) -> Callable[..., Tensor]:
    """A forward for `module` in which each row meets the parameters `per_depth` [depths, *shape] of its own depth.

    The first call finds the dimension of x that has the rows: a norm of heads may see them before the heads or behind.
    So it must have more rows than there are heads. Raises ValueError where no dimension has as many entries as rows.
    """
    plain = type(module).forward
    count = len(next(iter(per_depth.values())))
    dim: list[int] = []

    def at(number: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for name, values in per_depth.items():
            object.__setattr__(module, name, values[number])
        return plain(module, x, *args, **kwargs)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        depth = depths().clamp(max=count - 1)
        if not dim:
            dim.extend([n for n, size in enumerate(x.shape) if size == len(depth)][:1])
            if not dim:
                shape = list(x.shape)
                raise ValueError(f"{type(module).__name__}: no dimension of its input {shape} has {len(depth)} rows")
        present = depth.unique().tolist()
        if len(present) == 1:
            return at(present[0], x, *args, **kwargs)
        rows = [(depth == number).nonzero().squeeze(1) for number in present]
        parts = [at(n, x.index_select(dim[0], of_n), *args, **kwargs) for n, of_n in zip(present, rows, strict=True)]
        return torch.cat(parts, dim[0]).index_select(dim[0], torch.cat(rows).argsort())

    return forward
