"""The final model of a run: written whole, after a rehearsal before the first step."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from loopwise.directory import RECORD, finish, not_listed
from loopwise.disk import free_bytes, room, sync, sync_tree
from loopwise.errors import UserError
from loopwise.foreign import set_aside

from .card import write_card
from .checkpoint import RUN, written
from .output import refuse_foreign
from .pretrained import cast, parameters, smallest, write_model

if TYPE_CHECKING:
    import torch

    from .trainer import RecurrentTrainer


def publish(trainer: RecurrentTrainer, state: dict[str, torch.Tensor], model: str, out: Path, dtype: str) -> None:
    """Write the trained model with the weights `state` into `out`. Called by one process.

    config.json is moved last, so that an incomplete model cannot be loaded. Sets `trained_recurrences` in the config.
    Files of others that came into `out` during the run move aside. Raises UserError if the model cannot be written.
    """
    partial = out / ".final.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if trainer.curriculum:
        trainer.trained.config.trained_recurrences = trainer.curriculum.trained()
    kept = trainer.trained._keep_in_fp32_modules_strict or ()  # pyright: ignore[reportPrivateUsage]
    with written(partial, "the trained model"):
        _write(trainer, cast(state, dtype, kept), model, partial, dtype)
        sync_tree(partial)
        _move(partial, out)
    with suppress(OSError):  # the files are on the disk, and only their new place may be lost with the power
        sync(out)
    shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, out: Path) -> None:
    """Move all files of the directory `partial` into `out`, or none: an error takes those back that were moved.

    The record goes first: after a kill it shows which files are the run's. A file of others with the name of one of
    them moves aside before, and a line on stderr has its new name.
    """
    order = {RECORD: 0, "config.json": 2}
    paths = sorted(partial.iterdir(), key=lambda path: (order.get(path.name, 1), path.name))
    aside: dict[Path, Path] = {}
    try:
        for name in not_listed(out, [path.name for path in paths]):
            aside[out / name] = set_aside(out / name)
            print(f"{out / name} is not of this run, so it is now {aside[out / name].name}", file=sys.stderr)
        for path in paths:
            _remove_folder(out / path.name)
            path.replace(out / path.name)
    except OSError:
        for path in paths:
            if not path.exists():
                _remove_folder(out / path.name)
                (out / path.name).unlink(missing_ok=True)
        for place, kept in aside.items():
            kept.rename(place)
        raise


def _remove_folder(path: Path) -> None:
    """Remove a folder that an interrupted `_move` left: no rename replaces one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def _write(trainer: RecurrentTrainer, state: dict[str, torch.Tensor], model: str, directory: Path, dtype: str) -> None:
    write_model(trainer.trained, trainer.tokenizer, directory, state, dtype)
    write_card(directory, model, trainer.recipe, trainer)
    trainer.state.save_to_json(str(directory / "trainer_state.json"))
    record = {"run": trainer.run, "spent": trainer.spent()}
    (directory / RUN).write_text(json.dumps(record, indent=1), encoding="utf-8")
    finish(directory)


def rehearse(trainer: RecurrentTrainer, model: str, out: Path, dtype: str) -> None:
    """Write all files of `publish`, but only the smallest tensor of the weights, and delete them again.

    Raises UserError for a file that could not be written at the end, when the whole run would be lost, for a file of
    others in its place, and if the disk has no room for the weights.
    """
    import torch

    from . import adapters

    partial = out / ".rehearsal.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with written(partial, "the trained model"):
        base, _ = adapters.split(trainer.trained.state_dict())
        _write(trainer, smallest(base, dtype), model, partial, dtype)
    names = sorted(path.name for path in partial.iterdir())
    shutil.rmtree(partial, ignore_errors=True)
    refuse_foreign(out, not_listed(out, names))
    needed = parameters(trainer.trained) * getattr(torch, dtype).itemsize
    if (free := free_bytes(out)) < needed:
        raise UserError(f"{out}: the trained model {room(needed, free)}; make room first")
