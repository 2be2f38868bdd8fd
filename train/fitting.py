"""Checks of a training recipe against the model: keys without effect on it, and settings that it cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loopwise.errors import UserError
from loopwise.unused import Unused

from .checks import check_length
from .curriculum import Curriculum, curriculum_of
from .recipe import Recurrence, Train

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_model(model: str, config: PretrainedConfig, recipe: Train) -> Curriculum | None:
    """The curriculum of `recipe` for `model`; None for a plain model.

    Raises UserError for keys without effect on the model, and for settings that the model with `config` cannot run.
    """
    from . import objectives, teacher
    from .pretrained import is_recurrent

    recurrent = is_recurrent(config)
    chosen = curriculum(config, recipe, recipe.steps or 1)
    objectives.check(recipe.objectives, config, recurrent)
    supervision = recipe.objectives.deep_supervision
    if supervision and chosen and supervision.segments > chosen.cap:
        raise UserError(
            f"objectives.deep_supervision.segments={supervision.segments}: each segment needs a recurrence, and a step "
            f"has at most {chosen.cap}"
        )
    if supervision and (field := _reuses_first(config)):
        raise UserError(
            f"objectives.deep_supervision: this model's {field} reads what the first recurrence wrote, so that the "
            "loss of a segment would reach the first one, too"
        )
    if recipe.objectives.distillation:
        teacher.check(recipe.objectives.distillation, config)
    router = getattr(config, "router", None)
    if recipe.recurrence and recipe.recurrence.capacity_warmup and not (router and router["kind"] == "expert"):
        raise UserError("recurrence.capacity_warmup: this model has no expert-choice router")
    recipe.refuse_unused(_unused(recipe, config))
    _check_roles(recipe, config)
    _check_checkpointing(recipe.gradient_checkpointing, config, recurrent)
    if recurrent:
        _check_router(recipe, router)
    if recipe.data.padded:
        _check_padding(recipe, router)
    check_length("data.sequence_length", recipe.data.sequence_length, model, config)
    return chosen


def _check_padding(recipe: Train, router: dict[str, Any] | None) -> None:
    """Raises UserError for shares of tokens that would count the padding."""
    reason = "objectives.experts balances" if recipe.objectives.experts else "this model's router chooses among"
    if router or recipe.objectives.experts:
        raise UserError(
            f"data.packing_strategy={recipe.data.packing_strategy}: {reason} all tokens of a block, and padding is no "
            "token; use packing_strategy=wrapped"
        )


def curriculum(config: Any, recipe: Train, steps: int) -> Curriculum | None:
    """The curriculum of `recipe` for a model with `config` and a run of `steps`; None for a model without recurrence.

    Raises UserError if the two do not go together.
    """
    from .pretrained import is_recurrent

    keys, phases = recipe.recurrence, recipe.data.recurrence_by_phase()
    if not is_recurrent(config):
        by_data = {"data.recurrences": recipe.data.recurrences, "data.phases[].recurrence": any(x for _, x in phases)}
        if name := next((name for name, given in {"recurrence.*": keys, **by_data}.items() if given), None):
            raise UserError(
                f"{name} belongs to recurrent-depth models, and this is a plain {config.model_type}: "
                "leave these keys out, or convert it first (loopwise convert)"
            )
        return None
    keys = keys or Recurrence()
    records = tuple(recipe.data.recurrences.table.values()) if recipe.data.recurrences else ()
    chosen = curriculum_of(keys, keys.mean or config.num_recurrences, steps, recipe.seed, phases, records)
    if records:
        _check_rows(config, truncated=chosen.backprop is not None)
    if router := getattr(config, "router", None):
        _check_depths(router, chosen)
    if config.injection == "none" and chosen.truncates:
        # Without injection the prelude's output enters only as s_0, before the recurrences without gradient.
        assert chosen.backprop is not None
        raise UserError(
            f"recurrence.backprop={chosen.backprop.end}: with injection='none', steps of up to {chosen.cap} "
            "recurrences would leave the embeddings and the prelude of this model without gradient; drop "
            "recurrence.backprop, or convert with injection=linear"
        )
    return chosen


def _check_rows(config: Any, truncated: bool) -> None:
    """Raises UserError for a model whose rows cannot have different numbers of recurrences.

    truncated: True if only some recurrences carry gradient.
    """
    if truncated and config.kv_policy == "first":
        raise UserError("data.recurrences: with this model's kv_policy=first it does not go with recurrence.backprop")
    router, halts, sequence = getattr(config, "router", None), config.halting == "act", config.sharing == "sequence"
    if router or halts or sequence:
        name = "a router" if router else "halting=act" if halts else "sharing='sequence'"
        raise UserError(f"data.recurrences: this model has {name}, and its rows have one number of recurrences")


def _check_depths(router: dict[str, Any], chosen: Curriculum) -> None:
    kind, depths = router["kind"], router["depths"]
    constant = chosen.sampler == "fixed" and chosen.mean.kind == "constant"
    if chosen.cap > depths or (kind == "token" and not (constant and chosen.mean.end == depths)):
        rule = "runs exactly" if kind == "token" else "has at most"
        raise UserError(
            f"recurrence: a step of this curriculum has up to {chosen.cap} recurrences; this model's {kind}-choice "
            f"router {rule} {depths}"
        )


def _reuses_first(config: Any) -> str | None:
    """The field of `config` by which every recurrence reads keys and values of the first; None without one."""
    router = getattr(config, "router", None)
    if config.kv_policy == "first":
        return "kv_policy=first"
    return "router.kv=first-recursion" if router and router["kv"] == "first-recursion" else None


def _check_checkpointing(checkpointing: str, config: Any, recurrent: bool) -> None:
    if checkpointing == "recurrence" and not recurrent:
        raise UserError(
            f"gradient_checkpointing=recurrence belongs to recurrent-depth models, and this is a plain "
            f"{config.model_type}: use gradient_checkpointing=layer"
        )
    if checkpointing != "none" and recurrent and (field := _reuses_first(config)):
        raise UserError(
            f"gradient_checkpointing={checkpointing}: this model's {field} reads what the first recurrence wrote, "
            "which a second run of a recurrence does not have; set gradient_checkpointing=none"
        )


def _check_router(recipe: Train, router: dict[str, Any] | None) -> None:
    if router is None:
        return
    if recipe.objectives.experts:
        raise UserError(
            f"objectives.experts={recipe.objectives.experts:g}: this model's router leaves tokens out of recurrences, "
            "and the load of its experts is balanced over whole sequences only"
        )
    for depth in (recipe.recurrence and recipe.recurrence.eval_at) or ():
        if depth > router["depths"] or (router["kind"] == "token" and depth != router["depths"]):
            rule = "exactly" if router["kind"] == "token" else "at most"
            raise UserError(
                f"recurrence.eval_at={depth}: this model's {router['kind']}-choice router runs {rule} "
                f"{router['depths']} recurrences"
            )


def _unused(recipe: Train, config: PretrainedConfig) -> Iterator[Unused]:
    import torch

    from loopwise.model.experts import balances_experts
    from loopwise.model.modeling_source import causal_lm_class

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


def _check_roles(recipe: Train, config: PretrainedConfig) -> None:
    """Raises UserError for roles that the model lacks or that are frozen, and for Muon without a matrix to train."""
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
    present = sorted(set(by_name.values()))
    for role in keys.train or ():
        if role not in present:
            raise UserError(
                f"optimiser.train={','.join(keys.train or ())}: this model has no {role}; it has {', '.join(present)}"
            )
    optimisers.freeze(model, keys, recipe.objectives, recipe.adapters is not None)
    trained = {by_name[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    for role in keys.multipliers or {}:
        if role not in trained:
            raise UserError(
                f"optimiser.multipliers.{role} has no effect: the trained roles are {', '.join(sorted(trained))}"
            )
    if keys.kind == "muon" and not any(group["muon"] for group in optimisers.groups(model, keys)):
        raise UserError(
            "optimiser.kind=muon has no effect: no matrix of prelude, core, coda or injection is trained, and Muon "
            "trains only these; use optimiser.kind=adamw"
        )
