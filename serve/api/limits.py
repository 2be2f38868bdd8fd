"""Limits of serving: which models can be served, and what their requests may ask."""

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
            "for more, set max_recurrences=N in `loopwise serve`, or in its config.json"
        )


def check_model(fields: dict[str, Any], routed: bool = False) -> None:
    """Raises UserError for a recurrent-depth config, given by its fields, with a part that cannot be served yet.

    routed: routers can be served.
    """
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
    """Raises UserError for a router, given by its fields, that cannot run token by token, or with a `kv_policy`."""
    if router.get("inference") == "topk":
        raise UserError(
            "router.inference='topk' ranks the tokens of a whole sequence, which generation does not have: "
            "calibrate the model first (loopwise calibrate)"
        )
    if kv_policy:
        raise UserError(f"kv_policy={kv_policy!r}: a routed model has router.kv={router['kv']!r} instead")


def check_packed(router: dict[str, Any] | None, source: Any) -> None:
    """Raises UserError for a routed model with a sliding window: its packed keys and values have no window."""
    types = getattr(source, "layer_types", None) or ["full_attention"]
    windowed = getattr(source, "sliding_window", None) and (len(types) == 1 or set(types) != {"full_attention"})
    if router and windowed:
        raise UserError("a routed model whose layers have a sliding window cannot be served: use transformers")


@dataclass(frozen=True)
class HttpLimits:
    """Limits of the HTTP server; the keys of `loopwise serve` with these names describe them."""

    max_body_mib: int = 8
    body_seconds: int = 60
    max_choices: int = 128
    max_queue: int = 1024
    open_metrics: bool = False
    hang_seconds: int = 300


@dataclass(frozen=True)
class Limits:
    """Values that requests of a served model may have.

    num_recurrences: of a request that names none.   max_recurrences: the greatest.   rules: exit rules.
    prompt_exit: exits may end prompt positions.   fixed: every request runs at `num_recurrences`, whatever its fields.
    rule, decoder: of a request that names none.   max_in_flight: most positions of a request in flight.
    unfit: decoders that do not go with the model, and why.   routed: a router decides the depth of tokens.
    prompt_rules: exit rules that may end prompt positions; None: all.   max_model_len: positions of a request, in a
    server.
    """

    num_recurrences: int
    max_recurrences: int
    rules: tuple[str, ...]
    prompt_exit: bool
    fixed: bool = False
    rule: str = "fixed"
    decoder: str = "plain"
    max_in_flight: int = 8
    unfit: dict[str, str] = field(default_factory=dict)
    routed: bool = False
    prompt_rules: tuple[str, ...] | None = None
    max_model_len: int | None = None


def limits_of(config: dict[str, Any], lanes: LaneConfig) -> Limits:
    """The limits of a model with these fields of its `config`, in the lane engine with the settings `lanes`."""
    from ..engine.admission import prompt_rules, unfit
    from ..engine.exits import NAMES
    from ..engine.kv import policy_of

    rules = tuple(name for name in NAMES if config["exit_gate"] or name != "gate")
    fields = SimpleNamespace(**config)
    policy = policy_of(fields)
    return Limits(
        config["num_recurrences"],
        config["max_recurrences"],
        rules[:1] if config["router"] else rules,
        prompt_exit=config["kv_policy"] != "per-depth",
        rule=(config["exit"] or {}).get("rule", "fixed"),
        decoder=lanes.decoder,
        max_in_flight=lanes.max_in_flight,
        unfit=unfit(policy, fields),
        routed=bool(config["router"]),
        prompt_rules=tuple(name for name in prompt_rules(policy, fields) if name in rules),
    )
