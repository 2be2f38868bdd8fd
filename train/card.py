"""Provenance of a trained model: loopwise.json and a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from loopwise.card import as_front, copy_licences, metadata
from loopwise.carried import CARD
from loopwise.directory import RECORD, record_of, write_record
from loopwise.find_source import card_folder
from loopwise.hub import is_hub_id
from loopwise.version import __version__

from . import tasks
from .recipe import Train

if TYPE_CHECKING:
    from .trainer import RecurrentTrainer


def write_card(directory: Path, model: str, recipe: Train, trainer: RecurrentTrainer) -> None:
    """Write loopwise.json, README.md and the licence files of the model directory `model` into `directory`.

    Raises UserError for a licence file that is a link out of `model`.
    """
    folder = card_folder(model, recipe.revision)
    facts: dict[str, Any] = {
        "loopwise": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "source": {"id": model, "revision": recipe.revision},
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        **trainer.spent(),
        "held_out_loss": _measured(trainer, "eval_loss"),
        "held_out_accuracy": _measured(trainer, "eval_accuracy"),
        "effect": trainer.effect and trainer.effect.record(),
    }
    if folder and (folder / RECORD).is_file():  # provenance of the model that was trained
        facts["source"]["facts"] = record_of(folder)
    write_record(directory, facts)
    if folder:
        copy_licences(folder, directory)
    (directory / CARD).write_text(_card(facts, trainer, folder, directory), encoding="utf-8")


def _measured(trainer: RecurrentTrainer, prefix: str) -> dict[str, float]:
    """The last held-out measurements whose names begin with `prefix`."""
    return {name: value for name, value in trainer.evaluated.items() if name.startswith(prefix)}


def hub_datasets(recipe: Train) -> list[str]:
    """The training sources of `recipe` that are ids of the hub: no files, and no generated tasks."""
    sources = dict.fromkeys(source for part in recipe.data.parts() for source in part)
    return [
        source for source in sources if not tasks.is_task(source) and is_hub_id(source) and not {*source} & {*"*?["}
    ]


def _card(facts: dict[str, Any], trainer: RecurrentTrainer, folder: Path | None, directory: Path) -> str:
    """README.md of the model in `directory`. folder: with the source's card."""
    source = facts["source"]["id"]
    tags = ["loopwise", *(["recurrent-depth"] if trainer.curriculum else [])]
    front = metadata(source, folder, directory, tags, hub_datasets(trainer.recipe))
    right = facts["held_out_accuracy"]
    rows = []
    for name, loss in facts["held_out_loss"].items():
        at = name.removeprefix("eval_loss")
        share = f" {100 * right[f'eval_accuracy{at}']:.1f} |" if right else ""
        rows.append(f"| {at.removeprefix('_r') or '-'} | {loss:.4f} |{share}")
    head = "| recurrences | held-out loss |" + " right answers in % |" * bool(right)
    table = "\n".join(["", head, "|---" * (head.count("|") - 1) + "|", *rows, ""]) if rows else ""
    return f"""{as_front(front)}# {Path(source).name}, trained

Trained from `{source}` by loopwise {facts["loopwise"]}: {facts["steps"]:,} steps, {facts["tokens"]:,} tokens,
{facts["flops"]:.3g} training FLOPs (6 for each trained parameter and token; attention scores are left out).
{table}
The recipe, the versions and the model's own origin are in `loopwise.json`.
"""
