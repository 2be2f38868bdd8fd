"""`convert`: source checkpoint and recipe in, recurrent-depth checkpoint out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from loopwise.version import __version__

from ..carried import copy_licences
from ..checkpoint import config_fields
from ..directory import RECORD, check_new, new_directory
from ..errors import UserError
from ..gguf_source import unpacked
from ..model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from ..model.configuration_source import COLLECTING, clear_source_settings
from ..model.source_layers import layer_list_name
from ..sampling import greatest_id
from .agreement import decisive
from .architectures import layer_kinds
from .card import model_card
from .expected import check_config
from .formats import recognise
from .generation import write_generation_config
from .imports import fix_special_tokens, is_recurrent, plan_import, verify_import
from .influence import block_influence, plot
from .plan import Plan, make_plan
from .raw import RawTensors
from .recipe import ConvertRecipe
from .relax import own_parameters, ranks
from .source import SourceWeights, empty_model, find_source, hashing, read_config
from .tensors import Tensors
from .tokenizer import load_tokenizer, write_tokenizer
from .verify import verify
from .write import Pending, write_weights


def convert(
    source: str | Path,
    out: str | Path,
    recipe: ConvertRecipe,
    *,
    force: bool = False,
    check: bool = True,
    dry_run: bool = False,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Convert the checkpoint `source` (a directory, GGUF file or hub id) into a recurrent-depth checkpoint at `out`.

    `out` appears complete or not at all. Returns the facts that `loopwise.json` records. `max_dlogit` among them is the
    largest difference in logits between the written model, reloaded, and the source's own layers: 0 where they are
    equal bit for bit in the checkpoint's dtype, else in float64; `max_dlogit_by_dtype` names the dtypes.
    `dry_run` writes nothing. Raises UserError for a source, recipe or output that will not do.
    """
    recipe = recipe.model_copy()  # for settle_init, which goes by the source
    found = find_source(str(source), recipe.revision)
    with unpacked(found) as path, _plan(path, recipe) as made:
        tokenizer = load_tokenizer(path, str(source))
        facts: dict[str, Any] = {
            "loopwise": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "source": {"id": str(source), "revision": _revision(found, recipe)},
            "recipe": recipe.model_dump(exclude_none=True),
            **made.facts,
            **({"router": made.config.router} if made.config.router else {}),
        }
        facts["notes"] = _notes(path, made.config, tokenizer)
        facts["parameters"]["unique"] = sum(torch.Size(t.shape).numel() for t in made.pending)
        if dry_run:
            check_new(Path(out), found, force)
            return facts
        with new_directory(Path(out), found, force) as directory:
            _save_config(made.config, directory)
            if tokenizer is not None:
                write_tokenizer(tokenizer, directory)
            facts["notes"] += write_generation_config(path, directory)
            copy_licences(path, directory)
            with hashing(made.files) as hashes:
                write_weights(made.pending, directory, show_progress)
            facts["source"]["sha256"] = hashes
            made.finish(directory, facts)
            differences = made.verify(directory) if check else None
            facts["max_dlogit"] = decisive(differences) if differences else None
            facts["max_dlogit_by_dtype"] = differences
            (directory / RECORD).write_text(json.dumps(facts, indent=2) + "\n")
            (directory / "README.md").write_text(model_card(facts, made.config))
    return facts


@dataclass
class Made:
    """What is to be written, and how: by conversion or by import."""

    config: Any
    pending: list[Pending]
    files: list[Path]  # weight files of the source
    facts: dict[str, Any]
    verify: Callable[[Path], dict[str, float]]
    finish: Callable[[Path, dict[str, Any]], None]  # adds to the directory and the facts what writing told


def _plan(path: Path, recipe: ConvertRecipe) -> AbstractContextManager[Made]:
    return _import(path, recipe) if is_recurrent(path, recipe) else _convert(path, recipe)


@contextmanager
def _convert(path: Path, recipe: ConvertRecipe) -> Iterator[Made]:
    source_config = read_config(path)
    clear_source_settings(source_config)
    with torch.device("meta"):
        source_model = empty_model(source_config)
    with SourceWeights(path, source_model) as weights:
        influence: list[float] = []

        def measure() -> list[float]:
            influence[:] = block_influence(path, weights, str(recipe.influence), _common_dtype(weights))
            return influence

        recipe.settle_init(source_config.hidden_size)
        plan = make_plan(recipe, layer_kinds(source_model), measure)
        if weights.untied:
            source_config.tie_word_embeddings = False
        dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
        relaxation = _relaxation(plan, recipe, source_model, weights)
        config = _config(source_config, plan, recipe, relaxation, dtype or _common_dtype(weights))
        tensors = Tensors(config, plan, recipe, source_model, weights, dtype)
        facts: dict[str, Any] = {
            "plan": {**asdict(plan), "dropped": plan.dropped(source_config.num_hidden_layers)},
            "parameters": {"source": sum(torch.Size(weights.shape(name)).numel() for name in weights.names())},
        }
        if influence:
            facts["influence"] = influence

        def check(directory: Path) -> dict[str, float]:
            check_config(directory, config)
            zero = any(factors.init == "zero" for factors in tensors.low_rank.values())
            return verify(directory, plan, source_config, weights, tensors.pending, dtype, recipe.seed, zero)

        def finish(directory: Path, facts: dict[str, Any]) -> None:
            if tensors.low_rank:
                facts["lora_error"] = tensors.errors()
            if influence:
                plot(influence, facts["plan"], directory / "influence.png")

        yield Made(config, tensors.pending, weights.files, facts, check, finish)


@contextmanager
def _import(path: Path, recipe: ConvertRecipe) -> Iterator[Made]:
    fields = config_fields(path)
    with RawTensors(path) as raw:
        kind = recognise(fields, raw.names())
        config, imported, pending = plan_import(kind, fields, raw, recipe)
        parts = {part: getattr(config, part) for part in ("prelude", "core", "coda")}
        facts: dict[str, Any] = {
            "format": kind.name,
            "plan": {
                **parts,
                "parents": {part: [[layer] for layer in layers] for part, layers in parts.items()},
                "dropped": [],
                **{key: getattr(config, key) for key in ("sharing", "injection", "recurrence_norm", "state_init")},
                "num_recurrences": config.num_recurrences,
            },
            "parameters": {
                "source": sum(torch.Size(raw.shape(name)).numel() for name in raw.names() - imported.ignored)
            },
        }
        dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
        yield Made(
            config,
            pending,
            raw.files,
            facts,
            lambda directory: verify_import(directory, kind, fields, raw, config, pending, dtype),
            lambda directory, facts: fix_special_tokens(directory, config),
        )


def _relaxation(
    plan: Plan, recipe: ConvertRecipe, source_model: PreTrainedModel, weights: SourceWeights
) -> dict[str, Any] | None:
    if recipe.lora is None:
        return None
    name = layer_list_name(source_model, source_model.config.num_hidden_layers)
    layers = [ranks(source_model.get_submodule(f"{name}.{layer}"), recipe.lora) for layer in plan.core]
    rank = {path: r for path, r in layers[0].items() if all(path in other for other in layers)}
    own = own_parameters(weights, f"{name}.", plan.stands_for)
    return {"depths": len(plan.stands_for), "rank": rank, "own": own, "dora": recipe.lora.dora}


def _config(
    source_config: Any, plan: Plan, recipe: ConvertRecipe, relaxation: dict[str, Any] | None, dtype: torch.dtype
) -> Any:
    if recipe.max_recurrences is not None and recipe.max_recurrences < plan.num_recurrences:
        raise UserError(
            f"max_recurrences={recipe.max_recurrences} is below num_recurrences={plan.num_recurrences}; raise it"
        )
    try:
        config = RecurrentDepthConfig(
            source_config=source_config,
            prelude=plan.prelude,
            core=plan.core,
            coda=plan.coda,
            num_recurrences=plan.num_recurrences,
            max_recurrences=recipe.max_recurrences or 0,
            state_init=plan.state_init,
            state_std=recipe.state_std,
            state_seed=recipe.seed,
            injection=plan.injection,
            sharing=plan.sharing,
            recurrence_norm=plan.recurrence_norm,
            recurrence_residual=plan.recurrence_residual,
            recurrence_encoding=plan.recurrence_encoding,
            halting=plan.halting,
            relaxation=relaxation,
            router=recipe.router.fields(plan.num_recurrences) if recipe.router else None,
            kv_policy=recipe.kv_policy,
            exit=recipe.exit.model_dump(exclude_none=True) if recipe.exit else None,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    config.dtype = dtype
    config.architectures = [RecurrentDepthForCausalLM.__name__]
    return config


def _common_dtype(weights: SourceWeights) -> torch.dtype:
    """The type of most parameters."""
    sizes: dict[torch.dtype, int] = {}
    for name in weights.names():
        dtype = weights.dtype(name)
        sizes[dtype] = sizes.get(dtype, 0) + torch.Size(weights.shape(name)).numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _notes(path: Path, config: Any, tokenizer: Any) -> list[str]:
    """A line on everything that the output does not take over from the source, or that a user should know of it."""
    fields = config_fields(path)
    notes = [
        f"{name}=true of the source's config is left out: "
        + (
            "objectives.experts of loopwise train balances experts"
            if "router" in name
            else "a layer runs several times"
        )
        for name in COLLECTING
        if fields.get(name)
    ]
    if tokenizer is not None and (greatest := greatest_id(tokenizer)) >= config.vocab_size:
        notes.append(
            f"the tokenizer gives ids up to {greatest}, and the embeddings end at {config.vocab_size - 1}: text with "
            f"{tokenizer.convert_ids_to_tokens(greatest)!r} cannot be computed"
        )
    return notes


def _save_config(config: RecurrentDepthConfig, directory: Path) -> None:
    """config.json, and the model files that let the checkpoint load where loopwise is not installed."""
    with torch.device("meta"):
        model = RecurrentDepthForCausalLM(config)
    custom_object_save(model, directory, config=cast(Any, config))
    config.save_pretrained(directory)


def _revision(path: Path, recipe: ConvertRecipe) -> str | None:
    """The commit of a hub snapshot, else the revision asked for."""
    for folder in (path, *path.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.name
    return recipe.revision
