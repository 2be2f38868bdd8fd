"""The FLOPs of training."""

from __future__ import annotations

from typing import Any

from .curriculum import Depth
from .pretrained import is_recurrent
from .schedule import capacities


def parameter_costs(model: Any) -> tuple[int, int]:
    """(parameters that a token uses once, parameters that it uses in every recurrence), without the embeddings."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    total = sum(p.numel() for p in model.parameters())
    if head is None or head.weight is not embeddings.weight:  # a tied matrix is used as the head
        total -= embeddings.weight.numel()
    recurring = 0
    if is_recurrent(model.config):
        recurring = sum(p.numel() for part in (model.core, model.injection) for p in part.parameters())
    return total - recurring, recurring


def token_flops(
    costs: tuple[int, int], depth: Depth | None, router: dict[str, Any] | None, step: int, warmup: int
) -> int:
    """Training FLOPs per token at `step`: 2 per parameter forward, 4 backward. Attention is left out.

    costs: from `parameter_costs`.   depth: None for a plain model.   router: the config field. An expert-choice router
    sends only the share of its capacity through a recurrence; `warmup`: steps of its capacity warm-up.
    """
    once, recurring = costs
    if depth is None:
        return 6 * (once + recurring)
    graded = depth.num_recurrences if depth.grad_recurrences is None else depth.grad_recurrences
    shares = [1.0] * depth.num_recurrences
    if router and router["kind"] == "expert":
        shares = capacities(router["capacity"], step, warmup)[: depth.num_recurrences]
    ungraded = depth.num_recurrences - graded
    return round(6 * once + recurring * (2 * sum(shares[:ungraded]) + 6 * sum(shares[ungraded:])))
