"""The FLOPs of training."""

from __future__ import annotations

from typing import Any, NamedTuple

from loopwise.active import active

from .curriculum import Depth
from .pretrained import is_recurrent
from .schedule import capacities


class Costs(NamedTuple):
    """Numbers of parameters that a token uses, without the embeddings: `once`; `each` recurrence; `read`, at each depth
    whose logits enter the loss (coda and head)."""

    once: float
    each: float
    read: float


def parameter_costs(model: Any) -> Costs:
    """The costs of `model`, recurrent or plain. Experts count as far as a token uses them."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    config = model.config

    def used(module: Any) -> float:
        return sum(  # a LoRA has a part for each depth, and is no stack of experts
            p.numel() if name.startswith("relaxation.") else active(config, name, p)
            for name, p in module.named_parameters()
        )

    total = used(model)
    if head is None or head.weight is not embeddings.weight:  # a tied matrix is used as the head
        total -= embeddings.weight.numel()
    each = read = 0.0
    if is_recurrent(config):
        each, read = used(model.core) + used(model.injection), used(model.coda) + (0 if head is None else used(head))
    return Costs(total - each - read, each, read)


def token_flops(
    costs: Costs, depth: Depth | None, router: dict[str, Any] | None, step: int, warmup: int, reads: int = 1
) -> int:
    """Training FLOPs per token at `step`: 2 per parameter forward, 4 backward. Attention is left out.

    depth: None for a plain model.   router: the config field. An expert-choice router sends only the share of its
    capacity through a recurrence; `warmup`: steps of its capacity warm-up.   reads: depths whose logits enter the loss.
    """
    if depth is None:
        return round(6 * sum(costs))
    recurrences = depth.num_recurrences
    graded = recurrences if depth.grad_recurrences is None else min(depth.grad_recurrences, recurrences)
    shares = [1.0] * recurrences
    if router and router["kind"] == "expert":
        shares = capacities(router["capacity"], step, warmup)[:recurrences]
    ungraded = recurrences - graded
    recurring = costs.each * (2 * sum(shares[:ungraded]) + 6 * sum(shares[ungraded:]))
    return round(6 * (costs.once + costs.read * reads) + recurring)
