"""The final model of a run: written whole, after a rehearsal before the first step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from loopwise.directory import finish
from loopwise.errors import UserError

from .card import write_card
from .checkpoint import RUN, sync, written
from .pretrained import cast, parameters, smallest, write_model

if TYPE_CHECKING:
    import torch

    from .trainer import RecurrentTrainer


def publish(trainer: RecurrentTrainer, state: dict[str, torch.Tensor], model: str, out: Path, dtype: str) -> None:
    """Write the trained model with the weights `state` into `out`. Called by one process.

    config.json is moved last, so that an incomplete model cannot be loaded. Sets `trained_recurrences` in the config.
    Raises UserError if the model cannot be written.
    """
    partial = out / ".final.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if trainer.curriculum:
        trainer.trained.config.trained_recurrences = trainer.curriculum.trained()
    with written(partial, "the trained model"):
        _write(trainer, cast(state, dtype), model, partial, dtype)
    for path in sorted(partial.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
        sync(path)
        path.replace(out / path.name)
    partial.rmdir()


def _write(trainer: RecurrentTrainer, state: dict[str, torch.Tensor], model: str, directory: Path, dtype: str) -> None:
    write_model(trainer.trained, trainer.tokenizer, directory, state, dtype)
    write_card(directory, model, trainer.recipe, trainer)
    trainer.state.save_to_json(str(directory / "trainer_state.json"))
    record = {"run": trainer.run, "spent": trainer.spent()}
    (directory / RUN).write_text(json.dumps(record, indent=1), encoding="utf-8")
    finish(directory)


def rehearse(trainer: RecurrentTrainer, model: str, out: Path, dtype: str) -> None:
    """Write all files of `publish`, but only the smallest tensor of the weights, and delete them again.

    Raises UserError for a file that could not be written at the end, when the whole run would be lost, and if the disk
    has no room for the weights.
    """
    import torch

    from . import adapters

    partial = out / ".rehearsal.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with written(partial, "the trained model"):
        base, _ = adapters.split(trainer.trained.state_dict())
        _write(trainer, smallest(base, dtype), model, partial, dtype)
    shutil.rmtree(partial, ignore_errors=True)
    needed = parameters(trainer.trained) * getattr(torch, dtype).itemsize
    if (free := shutil.disk_usage(out).free) < needed:
        raise UserError(
            f"{out}: the trained model will take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free there; "
            "make room first"
        )
