"""Tasks as a recipe changes them, the depths to measure at, and what cannot be measured."""

from __future__ import annotations

from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from ...errors import UserError
from ...train.pretrained import is_recurrent
from ..recipe import Evaluate
from .lanes import LanesLM
from .trust import check_runs_nothing


def depths_of(model: str, config: Any, asked: list[int] | None) -> list[int | None]:
    """The depths to measure at; [None] for a plain model. Raises UserError for depths of a plain model."""
    if is_recurrent(config):
        return [*(asked or [config.num_recurrences])]
    if asked:
        raise UserError(f"num_recurrences={asked}: {model} is a plain {config.model_type}, without recurrence")
    return [None]


def check_used(tasks: list[Any], recipe: Evaluate) -> None:
    """Raises UserError for gen_kwargs where no task generates."""
    if recipe.gen_kwargs and all(task.OUTPUT_TYPE != "generate_until" for task in tasks):
        raise UserError(f"gen_kwargs={recipe.gen_kwargs} has no effect: all tasks compare log-likelihoods")


def configure(task: Any, recipe: Evaluate) -> None:
    """Change the config of `task` as lm-eval's `simple_evaluate` does. Raises UserError for keys without effect."""
    if recipe.gen_kwargs and task.OUTPUT_TYPE == "generate_until":
        task.set_config(key="generation_kwargs", value=recipe.gen_kwargs, update=True)
    check_runs_nothing(task.get_config("generation_kwargs") or {}, task.task_name)
    own = task.get_config("num_fewshot")
    if own == 0 and recipe.num_fewshot:
        raise UserError(
            f"num_fewshot={recipe.num_fewshot} has no effect on task {task.task_name}, whose own config says 0"
        )
    if own is None or recipe.num_fewshot is not None:
        task.set_config(key="num_fewshot", value=recipe.num_fewshot or 0)
    if recipe.request and recipe.engine == "lanes" and not recipe.endpoint and task.OUTPUT_TYPE != "generate_until":
        raise UserError(
            f"request.{next(iter(recipe.request))} has no effect on task {task.task_name}: engine=lanes generates, and "
            "this task compares log-likelihoods"
        )


def check_generation(task: Any, lm: Any) -> None:
    """Raises UserError if the longest answer to `task` leaves `lm` no place for a prompt, or for a setting it lacks."""
    if task.OUTPUT_TYPE != "generate_until":
        return
    given = dict(normalize_gen_kwargs(task.get_config("generation_kwargs") or {}))
    most, positions = given.pop("max_gen_toks"), lm.max_length
    if most >= positions:
        raise UserError(
            f"task {task.task_name}: answers of up to {most} tokens leave no place for a prompt in {positions} "
            "positions; give gen_kwargs.max_gen_toks"
        )
    if isinstance(lm, LanesLM):
        lm.check_settings(given)
