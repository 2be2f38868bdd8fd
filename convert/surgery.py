"""`convert`: source checkpoint and recipe in, recurrent-depth checkpoint out."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .. import __version__
from ..errors import UserError
from ..model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from ..model.injection import Injection
from ..model.source_layers import layer_list_name
from .architectures import attention_types
from .card import model_card
from .plan import Plan, make_plan
from .recipe import ConvertRecipe
from .source import SourceWeights, copy_carried, empty_model, find_source, read_config
from .verify import verify
from .write import Pending, new_directory, write_weights

PARTS = ("prelude", "core", "coda")


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
    """Convert the checkpoint `source` (a directory or a hub id) into a recurrent-depth checkpoint at `out`.

    `out` appears complete or not at all. Returns the facts that `loopwise.json` records, `max_dlogit` among them: the
    largest difference in logits (float32) between the written model, reloaded, and the source's own layers.
    `dry_run` writes nothing. Raises UserError for a source, recipe or output that will not do.
    """
    path = find_source(str(source), recipe.revision)
    source_config = read_config(path)
    plan = make_plan(recipe, attention_types(source_config))
    with torch.device("meta"):
        source_model = empty_model(source_config)
    with SourceWeights(path, source_model) as weights:
        dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
        if weights.untied:
            source_config.tie_word_embeddings = False
        config = _config(source_config, plan, recipe, dtype or _common_dtype(weights))
        tensors = _tensors(config, plan, source_model, weights, dtype)
        facts: dict[str, Any] = {
            "loopwise": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "source": {"id": str(source), "revision": _revision(path, recipe)},
            "recipe": recipe.model_dump(exclude_none=True),
            "plan": {**asdict(plan), "dropped": plan.dropped(source_config.num_hidden_layers)},
            "parameters": {
                "source": sum(torch.Size(weights.shape(name)).numel() for name in weights.names()),
                "unique": sum(torch.Size(t.shape).numel() for t in tensors),
            },
        }
        if dry_run:
            return facts
        with new_directory(Path(out), path, force) as directory:
            copy_carried(path, directory)
            facts["source"]["sha256"] = weights.hashes()
            write_weights(tensors, directory, show_progress)
            _save_config(config, directory)
            facts["max_dlogit"] = verify(directory, plan, source_config, weights, dtype, recipe.seed) if check else None
            (directory / "loopwise.json").write_text(json.dumps(facts, indent=2) + "\n")
            (directory / "README.md").write_text(model_card(facts, config))
    return facts


def _config(source_config: Any, plan: Plan, recipe: ConvertRecipe, dtype: torch.dtype) -> Any:
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


def _tensors(
    config: Any,
    plan: Plan,
    source_model: PreTrainedModel,
    weights: SourceWeights,
    dtype: torch.dtype | None,
) -> list[Pending]:
    """Every tensor of the output, in the order in which it is written."""
    layers = layer_list_name(source_model, config.source_config.num_hidden_layers) + "."
    tensors = []

    def add(name: str, sources: list[str]) -> None:
        shapes = {tuple(weights.shape(source)) for source in sources}
        if len(shapes) > 1:
            raise UserError(f"{sources[0]} and the tensors to average it with differ in shape: {sorted(shapes)}")
        kind = dtype or weights.dtype(sources[0])
        tensors.append(Pending(name, kind, weights.shape(sources[0]), partial(_mean, weights, sources)))

    for name in weights.names():
        if not name.startswith(layers):
            add(f"source.{weights.stored_name(name)}", [name])
    for part in PARTS:
        for n, parents in enumerate(plan.parents[part]):
            first = f"{layers}{parents[0]}."
            for name in weights.names():
                if name.startswith(first):
                    suffix = name.removeprefix(first)
                    add(f"{part}.{n}.{suffix}", [f"{layers}{parent}.{suffix}" for parent in parents])
    if plan.injection == "linear":
        width = config.source_config.hidden_size
        make = partial(Injection.preserving_weight, width, plan.state_init)
        tensors.append(Pending("injection.weight", config.dtype, [width, 2 * width], make))
    return tensors


def _mean(weights: SourceWeights, names: list[str]) -> torch.Tensor:
    """The tensor of that name, or the mean of several, summed in float32."""
    if len(names) == 1:
        return weights.read(names[0])
    total = weights.read(names[0]).float()
    for name in names[1:]:
        total = total + weights.read(name).float()  # not in place: a tensor read in float32 is the mapped file itself
    return total / len(names)


def _save_config(config: RecurrentDepthConfig, directory: Path) -> None:
    """config.json, and the model files that let the checkpoint load where loopwise is not installed."""
    with torch.device("meta"):
        model = RecurrentDepthForCausalLM(config)
    custom_object_save(model, directory, config=cast(Any, config))
    config.save_pretrained(directory)


def _revision(path: Path, recipe: ConvertRecipe) -> str | None:
    """The commit of a hub snapshot, else the revision asked for."""
    return path.name if path.parent.name == "snapshots" else recipe.revision
