"""The settings a server starts with: the recipe's, then the model config's, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .api.decoders import auto_width, drafts_of
from .api.depth import check_minimum, exit_of
from .api.fields import FieldError
from .api.lanes import LaneConfig
from .api.limits import HttpLimits, check_depth, check_policy, check_router, limits_of
from .api.validation import check_drafts, validate_fields
from .checkpoint import Facts
from .recipe import ServeRecipe

if TYPE_CHECKING:
    from .engine.kv import KVPolicy

DRAFTS = ("draft_every", "draft_depths")


@dataclass(frozen=True)
class Defaults:
    """Settings of a server.

    engine, why: `lanes` or `fixed`, and the reason.   lanes: settings of the lane engine.   config: fields of the
    model's config that the server replaces.   router: the model's.   http: limits of the HTTP server.
    """

    engine: str
    why: str
    lanes: LaneConfig
    config: dict[str, Any]
    router: dict[str, Any] | None = None
    http: HttpLimits = field(default_factory=HttpLimits)

    @property
    def policy(self) -> KVPolicy:
        """The KV policy of the lane engine."""
        from .engine.kv import policy_of

        return policy_of(SimpleNamespace(**self.config, router=self.router))

    def line(self) -> str:
        """The settings in one line, for the user."""
        config = self.config
        if self.engine == "fixed":
            return f"engine=fixed ({self.why}): every request at num_recurrences={config['num_recurrences']}"
        exit = config["exit"]
        minimum = min(exit["min_recurrences"], config["num_recurrences"])
        threshold = "" if exit.get("threshold") is None else f", exit_threshold={exit['threshold']}"
        policy = self.policy
        cache = "" if policy.shares else "; keys and values are packed: no prefix cache"
        cache = "; slots are overwritten: whole prompts, no prefix cache" if policy.overwrites else cache
        bound = f", max_lanes={self.lanes.max_lanes}" if self.lanes.max_lanes else ""
        return (
            f"engine=lanes: num_recurrences={config['num_recurrences']} (a request may ask for 1 to "
            f"{config['max_recurrences']}), exit_rule={exit['rule']}{threshold}, min_recurrences="
            f"{minimum}, kv_policy={config['kv_policy']}, decoder={self.lanes.decoder} (up to "
            f"max_in_flight={self.lanes.max_in_flight} tokens of a request), "
            f"passes_per_step={self.lanes.passes_per_step}{bound}{cache}"
        )


def choose(facts: Facts, recipe: ServeRecipe) -> Defaults:
    """The settings of a server for a checkpoint with these facts. Raises UserError for keys that contradict them."""
    http = HttpLimits(**{one.name: getattr(recipe, one.name) for one in fields(HttpLimits)})
    return replace(_choose(facts, recipe), http=http)


def _choose(facts: Facts, recipe: ServeRecipe) -> Defaults:
    most = recipe.max_recurrences or max(facts.max_recurrences, recipe.num_recurrences or 0)
    if recipe.max_recurrences is None:
        check_depth(recipe.num_recurrences or facts.num_recurrences, facts.max_recurrences)
    depth = min(facts.num_recurrences, most) if recipe.num_recurrences is None else recipe.num_recurrences
    check_depth(depth, most)
    policy = recipe.kv_policy or facts.kv_policy
    check_policy(policy)
    engine, why = recipe.engine or "lanes", "as asked"
    if facts.sharing == "sequence":
        if recipe.engine == "lanes":
            raise UserError("engine=lanes: sharing='sequence' has no recurrence of the whole core; use engine=fixed")
        engine, why = "fixed", "sharing='sequence' has no recurrence of the whole core"
    if facts.router:
        check_router(facts.router, recipe.kv_policy)
        if recipe.engine == "fixed":
            raise UserError("engine=fixed: a routed model's tokens have the depths of its router; use engine=lanes")
        if most != facts.max_recurrences or depth != facts.num_recurrences:
            name, given = ("num_recurrences", depth) if most == facts.max_recurrences else ("max_recurrences", most)
            raise UserError(f"{name}={given}: this model's router has {facts.max_recurrences} recurrences")
    if facts.time_conditioning and engine == "fixed":
        raise UserError("engine=fixed: this model's time_conditioning is served by the lane engine; use engine=lanes")
    if engine == "fixed":
        for name in ("exit_rule", "exit_threshold", "min_recurrences", "kv_policy"):
            if getattr(recipe, name) is not None:
                raise UserError(f"{name}={getattr(recipe, name)}: the fixed engine has no exits; use engine=lanes")
        for name in ("decoder", "passes_per_step", "max_in_flight", "max_lanes", "budget", "coda_wait", *DRAFTS):
            if (given := getattr(recipe, name)) != ServeRecipe.model_fields[name].default:
                raise UserError(
                    f"{name}={given}: the fixed engine has one position of a request in flight, and no "
                    "passes of lanes; use engine=lanes"
                )
        return Defaults(engine, why, LaneConfig(), {"num_recurrences": depth, "max_recurrences": most})
    from .engine.admission import too_narrow

    lanes = _lanes(recipe, most)
    try:
        check_minimum(recipe.min_recurrences, depth)
        rule, threshold, minimum = exit_of(vars(recipe), most, facts.exit)  # requests may be deeper than `depth`
        exit = {"rule": rule, "threshold": threshold, "min_recurrences": minimum}
        values = {"exit_rule": rule, "exit_threshold": threshold, "min_recurrences": recipe.min_recurrences}
        config = {"num_recurrences": depth, "max_recurrences": most, "kv_policy": policy, "exit": exit}
        limits = limits_of({**vars(facts), **config}, lanes)
        of_rule = replace(limits, decoder="plain", routed=False)
        validate_fields({name: value for name, value in values.items() if value is not None}, of_rule)
        validate_fields({"decoder": lanes.decoder}, limits)
        check_drafts({name: getattr(recipe, name) for name in DRAFTS}, "wave", most)
    except FieldError as error:
        raise UserError(str(error)) from None
    defaults = Defaults(engine, why, lanes, config, facts.router)
    if reason := too_narrow(lanes.max_lanes, defaults.policy):
        raise UserError(reason)
    return defaults


def _lanes(recipe: ServeRecipe, max_recurrences: int) -> LaneConfig:
    """The recipe's settings of the lane engine."""
    every, depths = drafts_of(vars(recipe), 1, ())
    return LaneConfig(
        recipe.passes_per_step,
        recipe.max_lanes,
        coda_wait=recipe.coda_wait,
        decoder=recipe.decoder,
        max_in_flight=recipe.max_in_flight or auto_width(max_recurrences, every, depths),
        budget=recipe.budget,
        draft_every=every,
        draft_depths=depths,
    )
