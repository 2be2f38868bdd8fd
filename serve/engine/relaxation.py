"""Relaxation of rows at mixed depths: a hook takes LoRA, norms and biases of each row's own depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Depth = Callable[[], torch.Tensor]  # depths [N] of the rows that run, counted from 0


class RowFactors:
    """LoRA of one linear module, rows [..., N, in] at their own depths: one matrix product with the factors of all
    depths, of which a row keeps its own. So nothing is gathered, and shapes do not depend on the depths."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, depth: Depth):
        """a [depths, r, in], b [depths, out, r]."""
        self.depths, self.rank = a.shape[:2]
        self.a = a.flatten(0, 1).contiguous()  # [depths r, in]
        self.b = b.transpose(1, 2).flatten(0, 1).T.contiguous()  # [out, depths r]
        self.depth = depth

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        own = self.depth().clamp(max=self.depths - 1)[:, None] == torch.arange(self.depths, device=x.device)
        inner = nn.functional.linear(x, self.a).unflatten(-1, (self.depths, self.rank))
        return nn.functional.linear((inner * own[..., None]).flatten(-2), self.b)


def relax_linear(linear: Any, factors: Any, depth: Depth, row: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Add the LoRA `factors` (model.relaxation.Factors) to what `linear` gives. `row` makes [out, in] of its weight."""
    added = RowFactors(factors.lora_A.detach(), factors.lora_B.detach(), depth)
    scale = None
    if factors.dora_magnitude is not None:  # the lengths of the rows of W + B A, at every depth
        whole = row(linear.weight).detach() + factors.lora_B.detach() @ factors.lora_A.detach()
        scale = factors.dora_magnitude.detach() / torch.linalg.vector_norm(whole, dim=2)  # [depths, out]

    def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        if scale is None:
            return out + added(args[0])
        bias = 0 if linear.bias is None else linear.bias
        return (out - bias + added(args[0])) * scale[depth().clamp(max=len(scale) - 1)] + bias

    linear.register_forward_hook(hook)


def by_depth(module: nn.Module, own: dict[str, torch.Tensor], depth: Depth) -> Callable[..., torch.Tensor]:
    """A forward for `module` in which each row [..., N, in] meets the parameters `own` [depths, *shape] of its own."""
    plain = type(module).forward
    depths = len(next(iter(own.values())))

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        of = depth().clamp(max=depths - 1)
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
