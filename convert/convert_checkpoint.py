"""Conversion of a pretrained decoder by a recipe: plan, config, tensors, and their verification."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoint import config_fields
from ..errors import UserError
from ..find_source import HubWeights
from ..model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from ..model.configuration_source import clear_source_settings
from ..model.source_layers import FINAL_NORM, layer_list_name
from .architectures import layer_kinds
from .conversion import Conversion, Written
from .device import named_device
from .dtypes import common_dtype, named_dtype
from .expected import check_config
from .influence import block_influence, plot
from .plan import Plan, make_plan
from .quantised import find_method
from .recipe import ConvertRecipe, Layers
from .relax import own_parameters, ranks
from .repeats import equal_layers, note, to_fold
from .source import Compared, SourceWeights
from .source_config import empty_model, read_source, written_out
from .tensors import Tensors, worst
from .text_model import find_text_model
from .verify import DEPTH, verify


@contextmanager
def open_conversion(
    path: Path, recipe: ConvertRecipe, there: HubWeights | None = None, compared: Compared | None = None
) -> Generator[RecipeConversion]:
    """The conversion of the pretrained decoder in the directory `path`; its files are open within the block.

    there: its weights on the hub, where `path` lacks them; then layers are compared for `fold` alone.   compared: what
    the same conversion found in another process. Sets `init` of the recipe where it is left out. Raises UserError where
    source and recipe do not fit together.
    """
    method = find_method(config_fields(path), path, bool(recipe.dequantize))
    source = read_source(path)
    clear_source_settings(source.config)
    with torch.device("meta"):
        source_model = empty_model(source.config)
    whole = find_text_model(source.whole, source_model) if source.whole else None
    known = compared or Compared()
    with SourceWeights(path, source_model, whole, method, there, known.apart) as weights:
        conversion = RecipeConversion(path, source_model, weights, recipe, known.same)
        if whole:
            conversion.facts["notes"].append(whole.note(source_model))
        yield conversion


def can_fold(path: Path) -> bool:
    """True where method=fold would convert the source in the directory `path`."""
    try:
        with open_conversion(path, ConvertRecipe.model_validate({"method": "fold"})):
            return True
    except UserError:
        return False


class RecipeConversion(Conversion):
    """The conversion of the decoder `source_model`, on the meta device, with the tensors `weights`.

    same: as by `equal_layers`, where it is known.
    """

    def __init__(
        self,
        path: Path,
        source_model: PreTrainedModel,
        weights: SourceWeights,
        recipe: ConvertRecipe,
        same: list[int] | None = None,
    ):
        source_config = weights.config
        stored = common_dtype((weights.dtype(name), weights.shape(name)) for name in weights.names())
        self.weights = weights
        device = named_device(recipe.device)
        self.influence: list[float] = []

        def measure() -> list[float]:
            self.influence = block_influence(path, weights, str(recipe.influence), stored)
            return self.influence

        recipe.settle_init(source_config.hidden_size)
        kinds = layer_kinds(source_model)
        same = self.same = same if same is not None else _equal_layers(weights, source_model, kinds, recipe)
        block = to_fold(same, source_config.model_type) if recipe.method == "fold" else None
        self.plan = make_plan(recipe, kinds, measure, block.layers(len(kinds)) if block else None)
        _check_norm(self.plan, source_model)
        if weights.untied:
            source_config.tie_word_embeddings = False
        self.dtype = named_dtype(recipe.dtype)
        relaxation = _relaxation(self.plan, recipe, source_model, weights)
        config = _config(source_config, self.plan, recipe, relaxation, self.dtype or stored)
        order = config.order(min(self.plan.num_recurrences, DEPTH))  # verification writes it out as layers
        written_out(source_config, [getattr(self.plan, part)[n] for part, n, _ in order])
        self.tensors = Tensors(config, self.plan, recipe, source_model, weights, self.dtype, device)
        facts: dict[str, Any] = {
            "plan": {**asdict(self.plan), "dropped": [] if block else self.plan.dropped(len(kinds))},
            "parameters": {"source": sum(torch.Size(weights.shape(name)).numel() for name in weights.names())},
            "notes": [*note(same, block), *_note_left_out(weights)],
        }
        if self.influence:
            facts["influence"] = self.influence
        super().__init__(path, recipe, config, self.tensors.pending, weights.files, facts)

    def compared(self) -> Compared:
        """The layers that are equal, and the tied tensors that are not."""
        return Compared(self.same, self.weights.apart)

    def settled(self) -> ConvertRecipe:
        """The recipe with the layers that were chosen by a measurement of influence."""
        if not self.influence:
            return self.recipe
        chosen = Layers(prelude=self.plan.prelude, core=self.plan.core, coda=self.plan.coda)
        given = self.recipe.model_dump(exclude_unset=True, exclude={"sizes", "influence"})
        return ConvertRecipe.model_validate({**given, "layers": chosen.model_dump()})

    def finish(self, directory: Path, written: Written) -> dict[str, Any]:
        """Plot measured influences into influence.png; the fact `lora_error` where there are LoRA factors."""
        if self.influence:
            plot(self.influence, self.facts["plan"], directory / "influence.png")
        return {"lora_error": worst(written.errors)} if self.tensors.low_rank else {}

    def verify(self, directory: Path) -> dict[str, float]:
        """Compare the checkpoint in `directory` with the source's layers (see `verify.verify`)."""
        check_config(directory, self.config)
        return verify(directory, self.plan, self.weights, self.pending, self.dtype, self.recipe.seed, self._zero_lora())

    def _zero_lora(self) -> bool:
        """True where LoRA factors start at zero."""
        return any(factors.init == "zero" for factors in self.tensors.low_rank.values())


def _equal_layers(
    weights: SourceWeights, source_model: PreTrainedModel, kinds: list[str], recipe: ConvertRecipe
) -> list[int]:
    """`equal_layers`. Of weights on the hub every layer counts as unique, but for `fold`: comparisons may read much."""
    if weights.there and recipe.method != "fold":
        return list(range(len(kinds)))
    return equal_layers(weights, layer_list_name(source_model, len(kinds)) + ".", kinds)


def _note_left_out(weights: SourceWeights) -> list[str]:
    """A line on tensors of the source that its model in transformers leaves out; none where it has all."""
    if not (names := weights.left_out):
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"left out, as in transformers' {weights.config.model_type}: {names[0]}{more} (not of its text decoder)"]


def _check_norm(plan: Plan, source_model: PreTrainedModel) -> None:
    """Raises UserError where the norm between recurrences is to be a final norm that the source has elsewhere."""
    if plan.recurrence_norm == "between" and FINAL_NORM not in dict(source_model.named_modules()):
        raise UserError(
            f"recurrence_norm=between: this {source_model.config.model_type} has no final norm {FINAL_NORM} to stand "
            "between recurrences; use recurrence_norm=true, or injection=decayed"
        )


def _relaxation(
    plan: Plan, recipe: ConvertRecipe, source_model: PreTrainedModel, weights: SourceWeights
) -> dict[str, Any] | None:
    """The field `relaxation` of the config: ranks of the LoRA, and parameters that each depth has for itself."""
    if recipe.lora is None:
        return None
    name = layer_list_name(source_model, source_model.config.num_hidden_layers)
    rank = ranks([source_model.get_submodule(f"{name}.{layer}") for layer in plan.core], recipe.lora)
    own = own_parameters(weights, f"{name}.", plan.stands_for)
    return {"depths": len(plan.stands_for), "rank": rank, "own": own, "dora": recipe.lora.dora}


def _config(
    source_config: PreTrainedConfig,
    plan: Plan,
    recipe: ConvertRecipe,
    relaxation: dict[str, Any] | None,
    dtype: torch.dtype,
) -> RecurrentDepthConfig:
    """The config of the output. Raises UserError where its fields contradict each other."""
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
            recurrence_damping=plan.recurrence_damping,
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
