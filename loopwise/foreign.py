"""Files that Loopwise did not write, among those of its outputs: `--force` refuses them, and nothing deletes them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

RUN_RECORD = "train_recipe.yaml"  # the record of a training run without a final model
CHECKPOINT_RECORD = "run.json"  # lists the files of a checkpoint
DAMAGED = "run.json.damaged"  # its name in a damaged one
CHECKPOINT = re.compile(r"checkpoint-\d+")
EMISSIONS = "emissions.csv"  # of the tracker codecarbon
RUN_FILES = re.compile(  # files of a training run in OUT, beside its checkpoints and its tokens
    rf"{re.escape(RUN_RECORD)}|run\.png|{re.escape(EMISSIONS)}"
    r"|runs/(.+/)?events\.out\.tfevents\.[^/]+"
    r"|\.(checkpoint-\d+|final|rehearsal)\.partial(/.+)?"
)
TOKENS = "tokens"  # the folder of a run's packed data, whose writers take their names from here
BLOCKS = TRAIN, HELD_OUT, ALONE = "train", "held_out", "alone"  # the last: records that are measured each alone
MARKS, ARRAY, PARTIAL = "_marks", ".npy", ".partial.npy"
FACTS, COMMITS, ANSWERS = "facts.json", "commits.json", "held_out_answers.npy"
TEACHER = TEACHER_IDS, TEACHER_LOG_PROBS, TEACHER_DONE = "teacher_ids.npy", "teacher_log_probs.npy", "teacher_done"
TOKEN_FILES = {FACTS, COMMITS, ANSWERS, *TEACHER}
TOKEN_FILES |= {f"{name}{kind}{end}" for name in BLOCKS for kind in ("", MARKS) for end in (ARRAY, PARTIAL)}
PICTURES = {"calibration.sweep.png": "calibration.json"}  # of `loopwise plot` by their default names, and their sources
SYSTEM = {".DS_Store", "__pycache__"}  # of macOS and of Python, which come to any folder


def foreign_file(out: Path, listed: set[str], run: bool) -> str | None:
    """The first file of `out` that Loopwise did not write, by its name in `out`; None where there is none.

    listed: the files of its record.   run: files of a training run count as ours, too.
    """
    known = listed | {picture for picture, source in PICTURES.items() if source in listed}
    for path in sorted(out.iterdir()):
        if run and CHECKPOINT.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            if theirs := foreign_in_checkpoint(path):
                return f"{path.name}/{theirs}"
        elif theirs := _first(path, out, lambda name: name in known or (run and is_run_file(name))):
            return theirs
    return None


def foreign_in_checkpoint(checkpoint: Path) -> str | None:
    """The first file of the directory `checkpoint` that its record does not list; None where there is none.

    Without a record that can be read, all count as somebody's.
    """
    known = _recorded(checkpoint)
    return _first(checkpoint, checkpoint, known.__contains__)


def is_run_file(name: str) -> bool:
    """True for the `name` in OUT of a file that a training run writes there, beside checkpoints and the model."""
    folder, _, file = name.partition("/")
    return RUN_FILES.fullmatch(name) is not None or (folder == TOKENS and file in TOKEN_FILES)


def entries(folder: Path) -> list[Path]:
    """All that is in `folder` but files of the system, sorted by name; nothing where there is no such folder."""
    return sorted(path for path in folder.iterdir() if path.name not in SYSTEM) if folder.is_dir() else []


def remove_system_files(folder: Path) -> None:
    """Remove the system's files from `folder`, so that it can be removed, or replaced by a rename."""
    for path in map(folder.joinpath, SYSTEM):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename `path`, which Loopwise did not write, to make room for a file of that name. Returns the new place."""
    place, number = path.with_name(f"{path.name}.kept"), 1
    while os.path.lexists(place):
        number += 1
        place = path.with_name(f"{path.name}.kept-{number}")
    return path.rename(place)


def _recorded(checkpoint: Path) -> set[str]:
    for record in (CHECKPOINT_RECORD, DAMAGED):
        with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            files = json.loads((checkpoint / record).read_text(encoding="utf-8"))["files"]
            return {CHECKPOINT_RECORD, DAMAGED, *map(str, files)}
    return set()


def _first(path: Path, out: Path, ours: Callable[[str], bool]) -> str | None:
    """The first file at `path`, or below it, whose name in `out` is not one of `ours`. A link is a file."""
    for file in sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else [path]:
        name = file.relative_to(out).as_posix()
        if not (ours(name) or SYSTEM & {*name.split("/")}) and (file.is_symlink() or not file.is_dir()):
            return name
    return None
