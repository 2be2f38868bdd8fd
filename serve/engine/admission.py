"""Admission: the decoders and prompt exits that go with a model, its KV policy and a request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .exits import RULES
from .kv import KVPolicy
from .request import Request


def unfit(policy: KVPolicy, config: Any) -> dict[str, str]:
    """The decoders that do not go with a model of this RecurrentDepthConfig (or its fields) under `policy`, each with
    the reason."""
    if config.router:
        reason = "a routed model's tokens have the depths of its router: decoder 'plain'"
        return {"wave": reason, "diffusion": reason}
    reasons = {}
    if policy.slots < policy.depths:
        reasons["wave"] = f"a wave needs keys and values of every depth, which kv_policy={policy.name} does not keep"
    if config.injection == "none":
        reasons["diffusion"] = "diffusion refines a state by its input, which injection='none' never shows to the core"
    elif policy.name == "first":
        reasons["diffusion"] = "diffusion needs keys and values of later recurrences, which kv_policy=first drops"
    return reasons


def too_narrow(max_lanes: int, policy: KVPolicy) -> str | None:
    """The reason why passes of `max_lanes` lanes (0: no bound) cannot hold one request's; None if they can."""
    if not policy.complete or not 0 < max_lanes < policy.depths:
        return None
    return (
        f"max_lanes={max_lanes}: kv_policy={policy.name} has up to {policy.depths} lanes of a request in flight; "
        f"max_lanes={policy.depths} or more, or 0 for no bound"
    )


def prompt_rules(policy: KVPolicy, config: Any) -> tuple[str, ...]:
    """The rules that may end prompt positions, too.

    A rule that reads logits needs the coda, whose keys and values of a prompt's other positions have the depth of
    these. That depth depends on where a prompt is cut into chunks.
    """
    whole = policy.overwrites or not config.coda
    return tuple(name for name, rule in RULES.items() if whole or rule.reads != "logits")


def exact(request: Request, rule: str, config: Any) -> Request:
    """The request as it is decoded: plainly, if its exit `rule` reads logits through a coda. In a wave, the coda's keys
    of the positions before are those of drafts, by which the rule might end a position elsewhere."""
    plain = request.max_in_flight > 1 and RULES[rule].reads == "logits" and config.coda
    return replace(request, max_in_flight=1) if plain else request


def features(request: Request, rule: str) -> set[str]:
    """Features that not every request has: exit `rule`, kind of sampling, and traits by which ticks and graphs differ.

    at_one: a position may leave after its first recurrence.   trails: one may leave before the request's last.
    """
    most, forced = request.num_recurrences, {*request.forced_depths} - {0}
    others = {
        "wave": request.max_in_flight > 1,
        "diffusion": request.diffusion is not None,
        "sampled_by_host": request.sampled_by_host,
        "penalised": request.penalised,
        "logprobs": request.logprobs is not None,
        "at_one": most == 1 or 1 in forced or (rule != "fixed" and request.min_recurrences == 1),
        "trails": rule != "fixed" or any(depth < most for depth in forced),
    }
    return {rule, request.sampling, *(name for name, has in others.items() if has)}


def refusal(request: Request, policy: KVPolicy, config: Any, max_in_flight: int) -> str | None:
    """The reason why a request's decoder or exits do not go with the model, its KV policy or the request itself.

    None if they do.
    max_in_flight: most positions of one request in flight, as the engine was started.
    """
    diffusion = request.diffusion
    if config.router and (request.rule != "fixed" or request.forced_depths):
        return "a routed model's tokens have the depths of its router: exit_rule 'fixed', no trace"
    if not 1 <= request.max_in_flight <= max_in_flight:
        return (
            f"max_in_flight={request.max_in_flight}: the engine was started with max_in_flight={max_in_flight}, "
            "the most positions in flight"
        )
    if (request.max_in_flight > 1 or diffusion) and request.sampled_by_host:
        return "tokens that are sampled outside of the engine come one by one: decoder 'plain'"
    if request.prompt_exit and request.rule not in (may := prompt_rules(policy, config)):
        return f"prompt_exit with exit_rule={request.rule!r} reads logits through a coda: choose from {', '.join(may)}"
    if diffusion and request.penalised:
        return "a penalty needs the tokens before, which decoder 'diffusion' still changes: choose 'plain' or 'wave'"
    decoder = "diffusion" if diffusion else "wave" if request.max_in_flight > 1 else "plain"
    if reason := unfit(policy, config).get(decoder):
        return reason
    if diffusion and diffusion.window(max_in_flight) < 2:
        return "diffusion needs at least 2 positions in flight: max_in_flight=2 or more, when the engine starts, too"
    if diffusion and diffusion.inner > request.num_recurrences:
        return f"inner={diffusion.inner}: at most num_recurrences={request.num_recurrences}, as deep as the prompt goes"
    return diffusion.mistake() if diffusion else None
