"""What a server starts with: the recipe's wishes, then what the model's config says, checked against each other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .checkpoint import Facts
from .recipe import ServeRecipe
from .vllm.fields import FieldError, Limits, check
from .vllm.lanes import LaneConfig
from .vllm.limits import check_depth


@dataclass(frozen=True)
class Defaults:
    """The engine, the lanes' settings, and fields of the model's config that the server replaces."""

    engine: str
    why: str
    lanes: LaneConfig
    config: dict[str, Any]

    def line(self) -> str:
        """What was picked, for the user."""
        config = self.config
        if self.engine == "fixed":
            return f"engine=fixed ({self.why}): every request at num_recurrences={config['num_recurrences']}"
        exit = config["exit"]
        threshold = "" if exit.get("threshold") is None else f", exit_threshold={exit['threshold']}"
        cache = "" if cuts_prompts(config["kv_policy"]) else "; slots are overwritten: whole prompts, no prefix cache"
        return (
            f"engine=lanes: num_recurrences={config['num_recurrences']} (a request may ask for 1 to "
            f"{config['max_recurrences']}), exit_rule={exit['rule']}{threshold}, min_recurrences="
            f"{exit['min_recurrences']}, kv_policy={config['kv_policy']}, {self.lanes.ticks} ticks a step{cache}"
        )


def choose(facts: Facts, recipe: ServeRecipe) -> Defaults:
    """Raises UserError where the recipe asks for what the model cannot do."""
    most = recipe.max_recurrences or max(facts.max_recurrences, recipe.num_recurrences or 0)
    if recipe.max_recurrences is None:
        check_depth(recipe.num_recurrences or facts.num_recurrences, facts.max_recurrences)
    depth = min(facts.num_recurrences, most) if recipe.num_recurrences is None else recipe.num_recurrences
    check_depth(depth, most)
    policy = recipe.kv_policy or facts.kv_policy
    if not re.fullmatch(r"per-depth|last-exited|single|first|modulo-[1-9]\d*", policy):
        raise UserError(
            f"kv_policy={policy!r}: choose from per-depth, last-exited, single, first, modulo-k as modulo-4"
        )
    rule = recipe.exit_rule or facts.exit.get("rule", "fixed")
    threshold = recipe.exit_threshold
    if threshold is None and rule == facts.exit.get("rule"):
        threshold = facts.exit.get("threshold")
    exit = {
        "rule": rule,
        "threshold": threshold,
        "min_recurrences": min(recipe.min_recurrences or facts.exit.get("min_recurrences", 1), depth),
    }
    config = {"num_recurrences": depth, "max_recurrences": most, "kv_policy": policy, "exit": exit}
    engine, why = recipe.engine or "lanes", "as asked"
    if facts.sharing == "sequence":
        if recipe.engine == "lanes":
            raise UserError("engine=lanes: sharing='sequence' has no recurrence of the whole core; use engine=fixed")
        engine, why = "fixed", "sharing='sequence' has no recurrence of the whole core"
    if engine == "fixed":
        for name in ("exit_rule", "exit_threshold", "min_recurrences", "kv_policy"):
            if getattr(recipe, name) is not None:
                raise UserError(f"{name}={getattr(recipe, name)}: the fixed engine has no exits; engine=lanes")
        return Defaults(engine, why, LaneConfig(), {"num_recurrences": depth, "max_recurrences": most})
    values = {"exit_rule": rule, "exit_threshold": exit["threshold"], "min_recurrences": exit["min_recurrences"]}
    try:
        check({name: value for name, value in values.items() if value is not None}, limits_of(config, facts.exit_gate))
    except FieldError as error:
        raise UserError(str(error)) from None
    return Defaults(engine, why, LaneConfig(recipe.ticks, recipe.width, recipe.coda_batch), config)


def limits_of(config: dict[str, Any], exit_gate: bool) -> Limits:
    """What requests may ask of a model with these fields in the lane engine."""
    from .engine.exits import NAMES

    rules = tuple(name for name in NAMES if exit_gate or name != "gate")
    may_exit = config["kv_policy"] != "per-depth"
    return Limits(config["num_recurrences"], config["max_recurrences"], rules, prompt_exit=may_exit)


def cuts_prompts(kv_policy: str) -> bool:
    """Whether prompts can be computed in chunks, and their blocks shared."""
    from .engine.kv import KVPolicy

    return not KVPolicy(kv_policy, 1 << 30).overwrites
