"""Relaxation of rows at mixed depths: a hook takes LoRA, norms and biases of each row's own depth.

Shapes: N rows. Depths are counted from 0: [N], or [1] of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Depths = Callable[[], torch.Tensor]

_library = torch.library.Library("loopwise", "FRAGMENT")
_library.define("add_product(Tensor(a!) out, Tensor x, Tensor matrix, int start) -> ()")


def add_product(out: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor, start: int = 0) -> None:
    """Add x [..., in] times `matrix` [width, in] to columns `start` and after of `out` [..., out], in place: what the
    rows of many prompts take is too much to be written more often than need be."""
    torch.ops.loopwise.add_product(out.flatten(0, -2), x.flatten(0, -2), matrix, start)


def _add_product(out: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor, start: int) -> None:
    out.narrow(1, start, len(matrix)).addmm_(x, matrix.T)


_library.impl("add_product", _add_product, "CompositeExplicitAutograd")
torch.library.register_fake("loopwise::add_product", lambda out, x, matrix, start: None, lib=_library)


class RowFactors:
    """LoRA of one linear module, rows [..., N, in] at their own depths: one matrix product with the factors of all
    depths, of which a row keeps its own. So nothing is gathered, and shapes do not depend on the depths. Rows that are
    all at one depth, such as a prompt's, meet its factors alone."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, depths: Depths):
        """a [depths, r, in], b [depths, out, r]."""
        self.depths, self.rank = a.shape[:2]
        self.each_a, self.each_b = a, b
        self.a = a.flatten(0, 1).contiguous()  # [depths r, in]
        self.b = b.transpose(1, 2).flatten(0, 1).T.contiguous()  # [out, depths r]
        self.of_rows = depths

    def __call__(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`out` [..., N, out] of the module for x [..., N, in], with what the LoRA adds; it may be overwritten."""
        of = self.of_rows().clamp(max=self.depths - 1)
        if len(of) == 1:
            a, b = (each.index_select(0, of)[0] for each in (self.each_a, self.each_b))
            add_product(out, nn.functional.linear(x, a), b)
            return out
        own = of[:, None] == torch.arange(self.depths, device=x.device)
        inner = nn.functional.linear(x, self.a).unflatten(-1, (self.depths, self.rank))
        return out + nn.functional.linear((inner * own[..., None]).flatten(-2), self.b)


def relax_linear(
    linear: Any,
    factors: Any,
    depths: Depths,
    row: Callable[[torch.Tensor], torch.Tensor],
    biases: torch.Tensor | None = None,
) -> None:
    """Add the LoRA `factors` (model.relaxation.Factors) to what `linear` gives. `row` makes [out, in] of its weight;
    `biases` [depths, out]: those that it has at every depth, if it has more than one."""
    change = RowFactors(factors.lora_A.detach(), factors.lora_B.detach(), depths)
    scale = None
    if factors.dora_magnitude is not None:  # the lengths of the rows of W + B A, at every depth
        whole = row(linear.weight).detach() + factors.lora_B.detach() @ factors.lora_A.detach()
        scale = factors.dora_magnitude.detach() / torch.linalg.vector_norm(whole, dim=2)  # [depths, out]

    def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        out = change(out, args[0])
        if scale is None:
            return out
        of = depths().clamp(max=len(scale) - 1)
        bias = (0 if linear.bias is None else linear.bias) if biases is None else biases[of]
        return (out - bias) * scale[of] + bias

    linear.register_forward_hook(hook)


def by_depth(module: nn.Module, own: dict[str, torch.Tensor], of_rows: Depths) -> Callable[..., torch.Tensor]:
    """A forward for `module` in which each row meets the parameters `own` [depths, *shape] of its own depth.

    Which dimension of x is the rows' (a norm of heads may see them before the heads or behind) shows in the first call,
    which must have more rows than there are heads. Raises ValueError where none has their number.
    """
    plain = type(module).forward
    depths = len(next(iter(own.values())))
    dim: list[int] = []

    def at(number: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        for name, values in own.items():
            object.__setattr__(module, name, values[number])
        return plain(module, x, *args, **kwargs)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        of = of_rows().clamp(max=depths - 1)
        if not dim:
            dim.extend([n for n, size in enumerate(x.shape) if size == len(of)][:1])
            if not dim:
                raise ValueError(f"{type(module).__name__}: parameters of each depth for what is no row of {len(of)}")
        present = of.unique().tolist()
        if len(present) == 1:
            return at(present[0], x, *args, **kwargs)
        rows = [(of == number).nonzero().squeeze(1) for number in present]
        parts = [at(n, x.index_select(dim[0], of_n), *args, **kwargs) for n, of_n in zip(present, rows, strict=True)]
        return torch.cat(parts, dim[0]).index_select(dim[0], torch.cat(rows).argsort())

    return forward
