"""Relaxation of rows at mixed depths: a hook takes LoRA, norms and biases of each row's own depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


class RowDepths(NamedTuple):
    """Depths `of` the rows that run [N], counted from 0. From row `mixed` on all are the last one's; None: of no row is
    that known."""

    of: torch.Tensor
    mixed: int | None = None


Depths = Callable[[], RowDepths]


class RowFactors:
    """LoRA of one linear module, rows [..., N, in] at their own depths: one matrix product with the factors of all
    depths, of which a row keeps its own. So nothing is gathered, and shapes do not depend on the depths. Rows that are
    known to be at one depth, such as a prompt's, meet its factors alone."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, depths: Depths):
        """a [depths, r, in], b [depths, out, r]."""
        self.depths, self.rank = a.shape[:2]
        self.each_a, self.each_b = a, b
        self.a = a.flatten(0, 1).contiguous()  # [depths r, in]
        self.b = b.transpose(1, 2).flatten(0, 1).T.contiguous()  # [out, depths r]
        self.of_rows = depths

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        of, mixed = self.of_rows()
        of = of.clamp(max=self.depths - 1)
        if mixed is None:
            return self._mixed(x, of)
        a, b = (each.index_select(0, of[-1:])[0] for each in (self.each_a, self.each_b))
        alike = nn.functional.linear(nn.functional.linear(x[..., mixed:, :], a), b)
        return torch.cat([self._mixed(x[..., :mixed, :], of[:mixed]), alike], -2)

    def _mixed(self, x: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        own = of[:, None] == torch.arange(self.depths, device=x.device)
        inner = nn.functional.linear(x, self.a).unflatten(-1, (self.depths, self.rank))
        return nn.functional.linear((inner * own[..., None]).flatten(-2), self.b)


def relax_linear(linear: Any, factors: Any, depths: Depths, row: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Add the LoRA `factors` (model.relaxation.Factors) to what `linear` gives. `row` makes [out, in] of its weight."""
    added = RowFactors(factors.lora_A.detach(), factors.lora_B.detach(), depths)
    scale = None
    if factors.dora_magnitude is not None:  # the lengths of the rows of W + B A, at every depth
        whole = row(linear.weight).detach() + factors.lora_B.detach() @ factors.lora_A.detach()
        scale = factors.dora_magnitude.detach() / torch.linalg.vector_norm(whole, dim=2)  # [depths, out]

    def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        if scale is None:
            return out + added(args[0])
        bias = 0 if linear.bias is None else linear.bias
        return (out - bias + added(args[0])) * scale[depths().of.clamp(max=len(scale) - 1)] + bias

    linear.register_forward_hook(hook)


def by_depth(module: nn.Module, own: dict[str, torch.Tensor], of_rows: Depths) -> Callable[..., torch.Tensor]:
    """A forward for `module` in which each row [..., N, in] meets the parameters `own` [depths, *shape] of its own."""
    plain = type(module).forward
    depths = len(next(iter(own.values())))

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        of = of_rows().of.clamp(max=depths - 1)
        out = None
        for number in range(depths):
            which = (of == number).nonzero().squeeze(1)
            if not len(which):
                continue
            for name, values in own.items():
                object.__setattr__(module, name, values[number])
            part = plain(module, x[..., which, :], *args, **kwargs)
            if out is None:
                out = part.new_empty(*x.shape[:-1], part.shape[-1])
            out[..., which, :] = part
        assert out is not None
        return out

    return forward
