"""The FLOPs of training."""

from __future__ import annotations

from typing import Any, NamedTuple

from loopwise.active import active

from .curriculum import Depth
from .pretrained import is_recurrent
from .schedule import capacities

# In the order of the forward pass: those of a recurrent model that are not `before`, by their names.
PARTS = {
    "before": (),
    "router": ("router.",),
    "each": ("core.", "injection.", "relaxation.", "damping."),
    "halting": ("halting_gate.",),
    "read": ("coda.",),
    "gate": ("exit_gate.",),
}


class Cost(NamedTuple):
    """Numbers that a token is multiplied with, forward, and backward for the gradients of inputs and parameters."""

    forward: float
    backward: float


class Costs(NamedTuple):
    """The costs of a token, without the embeddings: `once`; of `each` recurrence; of a `read` (coda and head), at each
    depth whose logits enter the loss."""

    once: Cost
    each: Cost
    read: Cost


def parameter_costs(model: Any) -> Costs:
    """The costs of `model`, recurrent or plain. Experts count as far as a token uses them.

    A frozen parameter has no gradient of its own; before the first trained part none flows through it either. An exit
    gate reads states and comes last: where it alone is trained, none flows through the model.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    # The parts in the order of the forward pass, each a list of (numbers, True if trained).
    parts: dict[str, list[tuple[float, bool]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if parameter is not embeddings.weight:
            part = _part(name, head, parameter) if is_recurrent(model.config) else "before"
            parts[part].append((_used(model.config, name, parameter), parameter.requires_grad))
    if head is not None and head.weight is embeddings.weight:
        parts["read"].append((embeddings.weight.numel(), embeddings.weight.requires_grad))
    flows, found = embeddings.weight.requires_grad, {}
    for part, parameters in parts.items():
        flows = flows or any(trained for _, trained in parameters)
        found[part] = Cost(
            sum(numbers for numbers, _ in parameters), sum(n * (flows + trained) for n, trained in parameters)
        )
    once = (found[part] for part in PARTS if part not in ("each", "read"))
    return Costs(Cost(*map(sum, zip(*once, strict=True))), found["each"], found["read"])


def _part(name: str, head: Any, parameter: Any) -> str:
    """The part of a recurrent model that a parameter is in."""
    if head is not None and parameter is head.weight:
        return "read"
    return next((part for part, names in PARTS.items() if name.startswith(names)), "before")


def _used(config: Any, name: str, parameter: Any) -> float:
    """The numbers of a parameter that a token is multiplied with, in a recurrence if it has parts for each."""
    return parameter[0].numel() if name.startswith("relaxation.") else active(config, name, parameter)


def token_flops(
    costs: Costs, depth: Depth | None, router: dict[str, Any] | None, step: int, warmup: int, reads: int = 1
) -> int:
    """Training FLOPs per token at `step`: 2 per parameter forward, 4 backward (2 if frozen, behind trained ones).

    Attention, a teacher, and what gradient checkpointing computes again are left out.

    depth: None for a plain model.   router: the config field. An expert-choice router sends only the share of its
    capacity through a recurrence; `warmup`: steps of its capacity warm-up.   reads: depths whose logits enter the loss.
    """
    if depth is None:
        return round(2 * sum(map(sum, costs)))
    recurrences = depth.num_recurrences
    graded = recurrences if depth.grad_recurrences is None else min(depth.grad_recurrences, recurrences)
    shares = [1.0] * recurrences
    if router and router["kind"] == "expert":
        shares = capacities(router["capacity"], step, warmup)[:recurrences]
    ungraded = recurrences - graded
    recurring = costs.each.forward * sum(shares) + costs.each.backward * sum(shares[ungraded:])
    return round(2 * (sum(costs.once) + sum(costs.read) * reads + recurring))


def step_flops(costs: Costs, objective: Any, step: int, depth: Depth | None) -> int:
    """Training FLOPs per token at `step` with an Objective, whose calls and read-outs are counted."""
    arguments = objective.router, step, objective.capacity_warmup
    if depth is None:
        return token_flops(costs, None, *arguments)
    total = 0
    for _, call in objective.passes(step, depth):
        read = objective.depths(step, call.num_recurrences)  # the call ends at the last of them
        total += token_flops(costs, Depth(read[-1], call.grad_recurrences), *arguments, reads=len(read))
    return total
