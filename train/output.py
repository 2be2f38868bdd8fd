"""OUT of a training run: when it may be replaced, and its state after a run that fails before its first checkpoint."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loopwise.directory import (
    RECORD,
    beside,
    check_nothing_foreign,
    is_ours,
    left_by_killed,
    not_listed,
    place,
    restore,
    settle,
)
from loopwise.errors import UserError
from loopwise.foreign import DAMAGED, EMISSIONS, TOKENS, entries, is_run_file, remove_system_files
from loopwise.foreign import RUN_RECORD as RECIPE

from .checkpoint import RUN, checkpoints, partials


@contextmanager
def discarded_unless_begun(out: Path) -> Iterator[None]:
    """A block that trains. If it fails before its first checkpoint, `give_up` restores `out`."""
    try:
        yield
    finally:
        give_up(out)


def give_up(out: Path) -> None:
    """Restore `out` if no checkpoint is in it: it is absent again, or the directory that --force replaced.

    Prints the place of that directory to stderr if files that Loopwise did not write prevent this.
    """
    if not begun(out):
        discard(out)
    old = beside(out, "old")
    if not out.exists() or _holds_ours(out):
        restore(old, out)
    elif old.is_dir():
        print(
            f"{out} holds files that Loopwise did not write, and stays; what --force was to replace is in {old}",
            file=sys.stderr,
        )


def begun(out: Path) -> bool:
    """True if `out` has a checkpoint or a final model."""
    return bool(checkpoints(out)) or (out / "config.json").exists()


def _holds_ours(out: Path) -> bool:
    """True if `out` has a checkpoint or a final model that a run wrote, so that what it replaced may go."""
    recorded = (path / name for path in checkpoints(out) for name in (RUN, DAMAGED))
    model = (out / "config.json").exists() and not not_listed(out, ["config.json"])
    return model or any(file.is_file() for file in recorded)


def discard(out: Path) -> None:
    """Remove from `out` the files that a run writes before its first checkpoint, and `out` if it is empty then."""
    if is_ours(out):
        remove_tokens(out)
        for partial in partials(out):
            shutil.rmtree(partial, ignore_errors=True)
        for events in out.glob("runs/*/events.out.tfevents.*"):  # the Trainer's, for TensorBoard
            events.unlink()
        for folder in [*out.glob("runs/*"), out / "runs"]:
            _remove_empty(folder)
        for name in (EMISSIONS, RECIPE):
            (out / name).unlink(missing_ok=True)
    _remove_empty(out)


def remove_tokens(out: Path) -> None:
    """Remove the packed tokens from `out`. A file of others among them stays, and so does their folder."""
    for file in (out / TOKENS).glob("*"):
        if is_run_file(f"{TOKENS}/{file.name}"):
            file.unlink()
    _remove_empty(out / TOKENS)


def _remove_empty(folder: Path) -> None:
    """Remove `folder` if nothing but files of the system is in it."""
    if folder.is_dir() and not folder.is_symlink() and not entries(folder):
        with suppress(OSError):  # where nothing may be written, or a file has just come
            remove_system_files(folder)
            folder.rmdir()


def recover(out: Path) -> None:
    """Put back the directory that a killed run was to replace, if that run wrote no checkpoint.

    Only files of runs are removed. OUT of a running process stays, and so does a directory that Loopwise did not write.
    """
    if left_by_killed(out, "old") and not begun(out):
        discard(out)
    if not out.exists() or (_holds_ours(out) and is_ours(out)):
        settle(out)


def check_out(model: str, out: Path, resume: bool, force: bool) -> None:
    """Raises UserError if a run of `model` may not write into `out`."""
    if resume and force:
        raise UserError("--resume continues the run in OUT, --force deletes it: give one")
    place(out, Path(model))
    if not entries(out):
        return
    run = (out / RECIPE).is_file()
    if resume and not run:
        raise UserError(f"{out}: no run to resume in it (no {RECIPE})")
    if force and not _replaceable(out):
        raise UserError(
            f"{out}: --force replaces an earlier run or a model that Loopwise wrote, and this holds neither; choose "
            "another directory"
        )
    if force:
        check_nothing_foreign(out)
    if resume:
        tokens = (f"{TOKENS}/{path.name}" for path in entries(out / TOKENS))
        refuse_foreign(out, [name for name in tokens if not is_run_file(name)])
        refuse_foreign(out, not_listed(out, ["config.json"]))  # by which a run counts as finished
    if not resume and not force:
        choices = "--resume continues the run in it, --force replaces it, or " if run else ""
        choices = "--force replaces it, or " if not run and _replaceable(out) else choices
        raise UserError(f"{out}: not empty; {choices}choose another directory")


def refuse_foreign(out: Path, names: Iterable[str]) -> None:
    """Raises UserError for the first of `names`, files in `out` that stand where this run's own would."""
    for name in names:
        raise UserError(f"{out / name} is not of this run, whose own file would replace it; move it elsewhere")


def _replaceable(out: Path) -> bool:
    """True if Loopwise wrote `out`. A copy of a run's recipe among other files does not count."""
    written = any((out / name).exists() for name in (RECORD, RUN, TOKENS)) or bool(checkpoints(out))
    return is_ours(out) and (written or {path.name for path in entries(out)} == {RECIPE})
