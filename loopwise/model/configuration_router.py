"""Configuration of the router of Mixture-of-Recursions (arXiv 2507.10524)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KINDS = ("expert", "token")
GATES = {"expert": ("sigmoid", "tanh"), "token": ("softmax", "sigmoid")}
NETWORKS = ("linear", "mlp")
INFERENCES = ("threshold", "topk")
UPDATES = ("add", "step")
KEYS_AND_VALUES = ("recursion-wise", "first-recursion")
ALPHA = {"expert": 0.1, "token": 1.0}


def router_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The complete fields of a router, from `given` and the defaults of its kind.

    kind: `expert` (every recurrence chooses among the tokens of the previous one) or `token` (every token chooses its
        depth once, before the first recurrence).
    depths: the number R of routed recurrences.
    alpha, temperature, gate: the weight of a recurrence's output is w = alpha * gate(W x / temperature).
    update: `add` (s + w core(s), as the authors') or `step` (s + w (core(s) - s)). The networks of `step` start at
        zero, and alpha defaults to the value for which w = 1 then: a conversion starts as the model without a router.
    network: `linear` (W x), or `mlp` (W2 gelu(W1 x), with a hidden layer of twice the width).
    kv: keys and values that a recurrence attends to: `recursion-wise` (of the tokens that it was chosen for) or
        `first-recursion` (those of the first recurrence, of all tokens).

    Of expert-choice alone:
    capacity: share of the sequence that each recurrence takes, R numbers in (0, 1] that never grow.
    inference: choice of tokens outside of training: `threshold` (the sigmoid of the logit reaches the recurrence's
        threshold: causal) or `topk` (the capacity, of the whole sequence: not causal, as in the paper).
    thresholds: R numbers in [0, 1].
    auxiliary: True trains separate routers that predict the choice; their logits decide at `threshold`.

    Raises ValueError, naming the value and the rule.
    """
    kind = given.get("kind")
    if kind not in KINDS:
        raise ValueError(f"router.kind={kind!r}: choose from {', '.join(KINDS)}")
    depths = given.get("depths")
    if not isinstance(depths, int) or isinstance(depths, bool) or depths < 1:
        raise ValueError(f"router.depths={depths!r}: an integer, at least 1")
    fields: dict[str, Any] = {
        "kind": kind,
        "depths": depths,
        "alpha": ALPHA[kind],
        "temperature": 1.0,
        "gate": GATES[kind][0],
        "network": "linear",
        "update": "add",
        "kv": "recursion-wise",
    }
    if kind == "expert":
        fields |= {
            "capacity": [(depths - r) / depths for r in range(depths)],
            "inference": "threshold",
            "thresholds": [0.5] * depths,
            "auxiliary": False,
        }
    if unknown := sorted(given.keys() - fields.keys()):
        raise ValueError(f"router.{unknown[0]} is no field of a router of kind {kind!r}: it has {', '.join(fields)}")
    fields |= {name: value for name, value in given.items() if value is not None}
    if fields["update"] == "step" and given.get("alpha") is None:
        fields["alpha"] = 2.0 if fields["gate"] == "sigmoid" else float(depths)
    _check_values(fields)
    return fields


def _check_values(fields: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the value and the rule, for the first of a router's complete `fields` that is wrong."""
    kind, depths = fields["kind"], fields["depths"]
    choices = {"gate": GATES[kind], "network": NETWORKS, "kv": KEYS_AND_VALUES, "inference": INFERENCES}
    choices["update"] = UPDATES
    for name, allowed in choices.items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(f"router.{name}={fields[name]!r}: choose from {', '.join(allowed)}")
    if fields["update"] == "step" and fields["gate"] == "tanh":
        raise ValueError("router.update='step' with router.gate='tanh': its weights start at 0, and not at 1")
    for name in ("alpha", "temperature"):
        if not 0 < fields[name] < float("inf"):
            raise ValueError(f"router.{name}={fields[name]}: a finite number above 0")
    if kind == "expert":
        check_capacity(fields["capacity"], depths)
        thresholds = fields["thresholds"]
        if len(thresholds) != depths or not all(0 <= t <= 1 for t in thresholds):
            raise ValueError(f"router.thresholds={thresholds}: {depths} numbers in [0, 1], one for each recurrence")


def check_capacity(capacity: Sequence[float], depths: int) -> None:
    """Raise ValueError unless `capacity` holds `depths` numbers in (0, 1], one for each recurrence, that never grow."""
    if len(capacity) != depths:
        raise ValueError(f"router.capacity={list(capacity)}: {depths} numbers, one for each recurrence")
    if not all(0 < share <= 1 for share in capacity):
        raise ValueError(f"router.capacity={list(capacity)}: every capacity is in (0, 1]")
    if sorted(capacity, reverse=True) != list(capacity):
        raise ValueError(
            f"router.capacity={list(capacity)}: a recurrence chooses among the tokens of the one before, so none is "
            "above the one before"
        )
