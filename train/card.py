"""Provenance of a trained model: loopwise.json and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml

from loopwise.carried import copy_licences
from loopwise.directory import RECORD, record_of
from loopwise.version import __version__

from .recipe import Train

if TYPE_CHECKING:
    from .trainer import RecurrentTrainer


def write_card(directory: Path, model: str, recipe: Train, trainer: RecurrentTrainer) -> None:
    """Write loopwise.json, README.md and the licence files of the model directory `model` into `directory`.

    Raises UserError for a licence file that is a link out of `model`.
    """
    source = Path(model)
    facts: dict[str, Any] = {
        "loopwise": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "source": {"id": model, "revision": recipe.revision},
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        **trainer.spent(),
        "held_out_loss": _measured(trainer, "eval_loss"),
        "held_out_accuracy": _measured(trainer, "eval_accuracy"),
    }
    if (source / RECORD).is_file():  # provenance of the model that was trained
        facts["source"]["facts"] = record_of(source)
    (directory / RECORD).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(_card(facts, trainer), encoding="utf-8")
    copy_licences(source, directory)


def _measured(trainer: RecurrentTrainer, prefix: str) -> dict[str, float]:
    """The last held-out measurements whose names begin with `prefix`."""
    return {name: value for name, value in trainer.evaluated.items() if name.startswith(prefix)}


def _card(facts: dict[str, Any], trainer: RecurrentTrainer) -> str:
    source = facts["source"]["id"]
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["loopwise"]}
    if trainer.curriculum:
        front["tags"].append("recurrent-depth")
    if not Path(source).is_dir():
        front["base_model"] = source
    right = facts["held_out_accuracy"]
    rows = []
    for name, loss in facts["held_out_loss"].items():
        at = name.removeprefix("eval_loss")
        share = f" {100 * right[f'eval_accuracy{at}']:.1f} |" if right else ""
        rows.append(f"| {at.removeprefix('_r') or '-'} | {loss:.4f} |{share}")
    head = "| recurrences | held-out loss |" + " right answers in % |" * bool(right)
    table = "\n".join(["", head, "|---" * (head.count("|") - 1) + "|", *rows, ""]) if rows else ""
    return f"""---
{yaml.safe_dump(front).strip()}
---
# {Path(source).name}, trained

Trained from `{source}` by loopwise {facts["loopwise"]}: {facts["steps"]:,} steps, {facts["tokens"]:,} tokens,
{facts["flops"]:.3g} training FLOPs (6 for each parameter and token; attention scores are left out).
{table}
The recipe, the versions and the model's own origin are in `loopwise.json`.
"""
