"""Checkpoints that are whole or absent, and the rule when a run may resume from one.

A checkpoint is written beside its place and renamed into it. Its `run.json` lists every file with size and checksum,
and the facts of the run that wrote it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loopwise.checkpoint import read_json
from loopwise.disk import FULL, checksum, sync, sync_tree, system_error
from loopwise.errors import UserError, reason
from loopwise.foreign import CHECKPOINT_RECORD as RUN
from loopwise.foreign import DAMAGED, foreign_in_checkpoint, set_aside
from loopwise.recipe import validate

from .recipe import Train

DIGEST = "digest of the data"
DERIVED = ("gradient_accumulation x processes", "checkpoint layout")  # keys of the record that are no recipe keys
# Keys that change logs and files of a run, but not its weights.
FREE = ("log_every", "save_every", "keep_checkpoints", "eval_every", "recurrence.eval_at", "report_to", "dtype")
_kept: set[Path] = set()  # checkpoints with files of others, of which this process has told


def partial_directory(out: Path, step: int) -> Path:
    """The directory in which checkpoint `step` is written before it becomes `out`/checkpoint-`step`."""
    return out / f".checkpoint-{step}.partial"


def partials(out: Path) -> list[Path]:
    """Partial checkpoints, final models and rehearsals in `out`, left by killed processes."""
    name = r"\.(checkpoint-\d+|final|rehearsal)\.partial"
    return [path for path in out.glob(".*.partial") if re.fullmatch(name, path.name)]


def commit(written: Path, target: Path, run: dict[str, Any], spent: dict[str, float]) -> None:
    """Turn the directory `written` into the checkpoint `target` with one rename.

    run: the facts of the run.   spent: its steps, tokens and FLOPs so far, for the record alone.
    A damaged checkpoint at `target` goes; one with a file of others moves aside, and a line on stderr has its new name.
    """
    files = {
        str(p.relative_to(written)): [p.stat().st_size, checksum(p)] for p in sorted(written.rglob("*")) if p.is_file()
    }
    (written / RUN).write_text(json.dumps({"files": files, "run": run, "spent": spent}, indent=1), encoding="utf-8")
    sync_tree(written)
    if target.exists():  # it is damaged, as a sound one would have been resumed
        if theirs := foreign_in_checkpoint(target):
            print(
                f"{target}: {theirs} in it is not of this run, so it is now {set_aside(target).name}", file=sys.stderr
            )
        else:
            shutil.rmtree(target)
    written.replace(target)
    sync(target.parent)


@contextmanager
def written(partial: Path, name: str) -> Iterator[None]:
    """A block that writes `name` into `partial`, which is deleted if the block fails.

    Raises UserError for a full disk and other system errors, and for a file that a library refuses to write. Earlier
    checkpoints stay.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{name} cannot be written ({reason(error)}): earlier checkpoints are unchanged, and --resume continues "
            "from them"
        ) from error
    except Exception as error:
        # torch.save wraps system errors.
        wrapped = isinstance(error, RuntimeError) and any(word in str(error) for word in ("writ", "inline_container"))
        message = system_error(error)
        if message is None and not wrapped:
            raise
        if wrapped:  # torch names a position in its file instead
            full = shutil.disk_usage(partial.parent).free < FULL
            codes = (errno.ENOSPC,) if full else (errno.EIO, errno.EDQUOT)
            message = " or ".join(map(os.strerror, codes))
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(partial.parent).free / 2**30
        raise UserError(
            f"{name} cannot be written to {partial.parent} ({message}; {free:.1f} GiB are free there): earlier "
            "checkpoints are unchanged; make room and continue with --resume"
        ) from error


def checkpoints(out: Path) -> list[Path]:
    """The checkpoint directories of `out`, newest first, damaged ones included."""
    found = [(int(m[1]), p) for p in out.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def damage(checkpoint: Path, thorough: bool) -> str | None:
    """The damage of a checkpoint in words, or None. thorough: compare checksums, not only sizes."""
    try:
        listed = read_json(checkpoint / RUN)["files"]
        files = [(str(name), int(size), int(crc)) for name, (size, crc) in listed.items()]
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {RUN}"
    for name, size, crc in files:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if thorough and checksum(path) != crc:
            return f"{name} differs from what was written"
    return None


def last_sound(out: Path, thorough: bool = False) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint of `out`, and a line on each newer one that is damaged.

    thorough: compare checksums, and mark damaged checkpoints by renaming their run.json.
    """
    notes = []
    for checkpoint in checkpoints(out):
        wrong = damage(checkpoint, thorough)
        if wrong is None:
            return checkpoint, notes
        notes.append(f"{checkpoint.name} is left out: {wrong}")
        if thorough:  # the processes of the run compare only sizes, and must skip it, too
            with suppress(FileNotFoundError):
                (checkpoint / RUN).replace(checkpoint / DAMAGED)
    return None, notes


def prune(out: Path, keep: int) -> None:
    """Delete all but the newest `keep` sound checkpoints, and the partial files of killed processes.

    A checkpoint with a file of others in it stays, and a line on stderr names that file.
    """
    found = checkpoints(out)
    sound = [path for path in found if damage(path, thorough=False) is None]
    for old in (path for path in found if path not in sound[:keep]):
        if not (theirs := foreign_in_checkpoint(old)):
            shutil.rmtree(old, ignore_errors=True)
        elif old not in _kept:
            _kept.add(old)
            print(f"{old}: kept, as {theirs} in it is not of this run; remove it yourself", file=sys.stderr)
    for partial in partials(out):
        shutil.rmtree(partial, ignore_errors=True)


def check_same_run(checkpoint: Path, run: dict[str, Any], accept: bool = False, finished: bool = False) -> None:
    """Raises UserError, with the changed keys, if `run` differs from the run that wrote `checkpoint`.

    run: from `Run.facts`; the digest of the data may be missing.   accept: print the changes to stderr instead.
    finished: `checkpoint` is the final model, whose dtype counts, and which nothing continues.
    """
    record = read_json(checkpoint / RUN).get("run")
    if not isinstance(record, dict) or not isinstance(record.get("recipe"), dict):
        raise UserError(f"{checkpoint / RUN}: not the record of a run")
    old = _flat(_as_today(record))
    new = _flat(run)
    compared = {*old, *new} - ({*FREE} - {"dtype"} if finished else {*FREE}) - ({DIGEST, "mean recurrences"} - {*new})
    changed = [
        f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(compared)
        if old.get(key) != new.get(key) or json.dumps(old.get(key)) != json.dumps(new.get(key))
    ]
    if changed and finished:
        raise UserError(
            f"{checkpoint} is the finished run of other settings ({'; '.join(changed)}): give the same settings, "
            "another directory, or --force, which replaces it"
        )
    if changed and accept:
        print(f"{checkpoint}: continuing with other settings ({'; '.join(changed)})", file=sys.stderr)
    elif changed:
        raise UserError(
            f"{checkpoint} was written by another run ({'; '.join(changed)}): resume with the same settings, start "
            "anew in another directory, or continue with the new settings: --accept-changes"
        )


def _as_today(run: dict[str, Any]) -> dict[str, Any]:
    """The record `run` of an earlier release, with the keys of today's recipe: added keys at their defaults.

    A recipe that today's rules refuse stays as it is, so that the comparison names its keys.
    """
    derived = {key: run["recipe"][key] for key in DERIVED if key in run["recipe"]}
    try:
        recipe = validate(Train, {key: value for key, value in run["recipe"].items() if key not in DERIVED})
    except UserError:
        return run
    keys = recipe.facts()
    del keys["gradient_accumulation"]
    return {**run, "recipe": keys | derived}


def _flat(run: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in run.items():
        if isinstance(value, dict):
            flat.update(_flat(value, "" if key == "recipe" else f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
