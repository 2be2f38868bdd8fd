"""Keys of a training recipe against the model: what has no effect on it, or cannot run, is refused at the start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loopwise.errors import UserError
from loopwise.unused import Unused

from .recipe import Train


def check(recipe: Train, config: Any, recurrent: bool) -> None:
    """Raises UserError for keys of `recipe` that the model with `config` has no use for, or that fail in its steps."""
    recipe.refuse_unused(_unused(recipe, config))
    _check_roles(recipe, config)
    if recipe.gradient_checkpointing == "recurrence" and not recurrent:
        raise UserError(
            f"gradient_checkpointing=recurrence belongs to recurrent-depth models, and this is a plain "
            f"{config.model_type}: use gradient_checkpointing=layer"
        )
    router = getattr(config, "router", None) if recurrent else None
    reuses = recurrent and (config.kv_policy == "first" or (router and router["kv"] == "first-recursion"))
    if recipe.gradient_checkpointing != "none" and reuses:
        name = "kv_policy=first" if config.kv_policy == "first" else "router.kv=first-recursion"
        raise UserError(
            f"gradient_checkpointing={recipe.gradient_checkpointing}: this model's {name} reads what the first "
            "recurrence wrote, which a second run of a recurrence does not have; set gradient_checkpointing=none"
        )
    if router and recipe.objectives.experts:
        raise UserError(
            f"objectives.experts={recipe.objectives.experts:g}: this model's router leaves tokens out of recurrences, "
            "and the load of its experts is balanced over whole sequences only"
        )
    for depth in (recipe.recurrence and recipe.recurrence.eval_at) or ():
        if router and (depth > router["depths"] or (router["kind"] == "token" and depth != router["depths"])):
            rule = "exactly" if router["kind"] == "token" else "at most"
            raise UserError(
                f"recurrence.eval_at={depth}: this model's {router['kind']}-choice router runs {rule} "
                f"{router['depths']} recurrences"
            )


def _unused(recipe: Train, config: Any) -> Iterator[Unused]:
    import torch

    from loopwise.model.experts import balances_experts
    from loopwise.model.modeling_sandwich import causal_lm_class

    router = getattr(config, "router", None)
    if recipe.objectives.router and router:
        others = {"expert": ("balancing", "bias_step"), "token": ("auxiliary",)}[router["kind"]]
        for name in others:
            yield Unused(f"objectives.router.{name}", (), f"this model's router is {router['kind']}-choice")
    if recipe.objectives.experts:
        source_config = getattr(config, "source_config", config)
        with torch.device("meta"):
            source = causal_lm_class(source_config)(source_config)
        if not balances_experts(source, [source]):
            yield Unused("objectives.experts", (), f"this {source_config.model_type} has no experts to balance")


def _check_roles(recipe: Train, config: Any) -> None:
    """Raises UserError for roles that the model does not have, or that do not learn, and for Muon without a matrix."""
    import torch
    from transformers import AutoModelForCausalLM

    from . import adapters, optimisers

    keys = recipe.optimiser
    if not (keys.train or keys.multipliers or recipe.adapters or keys.kind == "muon"):
        return
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
        if recipe.adapters:
            adapters.inject(model, recipe.adapters, None)
    by_name = optimisers.roles(model)
    there = sorted(set(by_name.values()))
    for role in keys.train or ():
        if role not in there:
            raise UserError(
                f"optimiser.train={','.join(keys.train or ())}: this model has no {role}; it has {', '.join(there)}"
            )
    optimisers.freeze(model, keys, recipe.objectives, recipe.adapters is not None)
    learns = {by_name[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    for role in keys.multipliers or {}:
        if role not in learns:
            raise UserError(
                f"optimiser.multipliers.{role} has no effect: of this model learn {', '.join(sorted(learns))}"
            )
    if keys.kind == "muon" and not any(group["muon"] for group in optimisers.groups(model, keys)):
        raise UserError(
            "optimiser.kind=muon has no effect: what learns has no matrix of prelude, core, coda or injection, which "
            "Muon is for; use optimiser.kind=adamw"
        )
