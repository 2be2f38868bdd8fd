"""What does not fit: refused with a reason, never ignored."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ...errors import UserError
from .lanes import LaneConfig


def check_depth(num_recurrences: int, limit: int) -> None:
    """Raises UserError unless 1 <= num_recurrences <= limit, the model's `max_recurrences`."""
    if not 1 <= num_recurrences <= limit:
        raise UserError(
            f"num_recurrences={num_recurrences}: this model is served at 1 to {limit} recurrences; "
            "for more, say max_recurrences=N to `loopwise serve`, or in its config.json"
        )


def check_model(fields: dict[str, Any], routed: bool = False) -> None:
    """Raises UserError for a recurrent-depth config, its fields given, with a part that serving does not have yet.
    `routed`: routers are had."""
    served = {} if routed else {"router": None}
    served |= {"recurrence_residual": False, "recurrence_encoding": "none", "halting": "none"}
    for name, value in served.items():
        if fields.get(name, value) != value:
            raise UserError(
                f"a model with {name}={fields[name]!r} cannot be served yet; transformers' generate runs it, and "
                "`loopwise export MODEL OUT --unroll R` writes it as a plain model, where its parts allow that"
            )


def check_policy(name: str) -> None:
    """Raises UserError, naming the choices, unless `name` is a KV policy that a model without a router can have."""
    from ...model.configuration_recurrent_depth import policy_slots

    try:
        policy_slots(name, 1)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_router(router: dict[str, Any], kv_policy: str | None = None) -> None:
    """Raises UserError for a router, its fields given, that no engine can follow, and for a `kv_policy` beside it."""
    if router.get("inference") == "topk":
        raise UserError(
            "router.inference='topk' takes the best of a whole sequence, which no one who generates it knows: "
            "calibrate the model first (loopwise calibrate)"
        )
    if kv_policy:
        raise UserError(f"kv_policy={kv_policy!r}: a routed model's is its router.kv, {router['kv']!r}")


def check_packed(router: dict[str, Any] | None, source: Any) -> None:
    """Raises UserError for a routed model with a sliding window, whose keys and values are packed."""
    types = getattr(source, "layer_types", None) or ["full_attention"]
    windowed = getattr(source, "sliding_window", None) and (len(types) == 1 or set(types) != {"full_attention"})
    if router and windowed:
        raise UserError("a routed model whose layers have a sliding window cannot be served: use transformers")


@dataclass(frozen=True)
class Limits:
    """What a served model offers. `fixed`: every request runs at `num_recurrences`; no field can change that. `rule`
    and `decoder` are those of a request that names none, `wave` the most positions in flight; `unfit` decoders do not
    go with it, for a reason. `routed`: tokens have the depth that a router gives them. `prompt_rules` may end prompt
    tokens, too; None: all."""

    num_recurrences: int
    max_recurrences: int
    rules: tuple[str, ...]
    prompt_exit: bool
    fixed: bool = False
    rule: str = "fixed"
    decoder: str = "plain"
    wave: int = 8
    unfit: dict[str, str] = field(default_factory=dict)
    routed: bool = False
    prompt_rules: tuple[str, ...] | None = None


def limits_of(config: dict[str, Any], lanes: LaneConfig) -> Limits:
    """What requests may ask of a model with these fields in the lane engine."""
    from ..engine.admission import prompt_rules, unfit
    from ..engine.exits import NAMES
    from ..engine.kv import policy_of

    rules = tuple(name for name in NAMES if config["exit_gate"] or name != "gate")
    here = SimpleNamespace(**config)
    policy = policy_of(here)
    return Limits(
        config["num_recurrences"],
        config["max_recurrences"],
        rules[:1] if config["router"] else rules,
        prompt_exit=config["kv_policy"] != "per-depth",
        rule=(config["exit"] or {}).get("rule", "fixed"),
        decoder=lanes.decoder,
        wave=lanes.wave,
        unfit=unfit(policy, here),
        routed=bool(config["router"]),
        prompt_rules=tuple(name for name in prompt_rules(policy, here) if name in rules),
    )
