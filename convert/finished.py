"""An OUT that is there already: whether it is what a command would make, so that it needs no second time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import first_difference
from ..directory import RECORD, changed_weights, is_whole, record_of
from ..errors import UserError
from ..find_source import commit_of
from ..foreign import entries
from ..input_files import newer
from .hashes import hashing


def check_done(out: Path, name: str, source: Path, asked: dict[str, Any], check: bool) -> None:
    """Raises UserError, with the first difference, unless the directory `out` is whole, was made from `source` as it is
    now, and by what is `asked`.

    name: the source as the command line has it.   asked: entries of the record, as JSON has them.   check: it has to be
    verified. A commit of the hub is known to be the same. The files of a directory are, if none is newer than `out` and
    the weights have the recorded sha256.
    """
    if reason := _difference(out, name, source, asked, check):
        raise UserError(f"{out} is not empty: {reason}; choose another directory, or replace it with --force")


def _difference(out: Path, name: str, source: Path, asked: dict[str, Any], check: bool) -> str | None:
    """The first difference between `out` and what `check_done` expects, in words."""
    record = record_of(out)
    made = record.get("source")
    if not isinstance(made, dict) or not _same_place(name, str(made.get("id"))):
        return f"it was made from {made.get('id') if isinstance(made, dict) else 'something else'}, not from {name}"
    if not is_whole(out):
        return "files are missing that its record names"
    if changed := changed_weights(out, thorough=False):
        return f"{changed} in it is not as it was written"
    if check and not record.get("max_dlogit_by_dtype"):
        return "it was made with --no-verify"
    before = {key: record.get(key) for key in asked}
    if found := first_difference(before, asked, "recipe.revision"):  # whose commit is compared
        return f"{found[0]} was {found[1]}, now {found[2]}"
    commit = commit_of(source)
    if not commit:
        return _change(source, made.get("sha256"), out)
    if commit != made.get("revision"):
        return f"{name} was at commit {made.get('revision')}, now {commit} (as revision, the first keeps it)"
    return None


def _same_place(name: str, known: str) -> bool:
    """True for the same hub id, or two names of one file or directory."""
    here, there = (Path(path).expanduser() for path in (name, known))
    return name == known or (here.exists() and here.resolve() == there.resolve())


def _change(source: Path, known: Any, out: Path) -> str | None:
    """A change of `source`, a directory or a file, since `out` was made, in words: weights without the `known` sha256,
    or another file that is newer."""
    if not isinstance(known, dict) or not known:
        return "its record has no sha256 of its source"
    # A file without an ending is recorded by the name of a link to it.
    weights = {name: source if source.is_file() else source / name for name in known}
    # A hard link, as `calibrate` makes, changes a file's st_ctime; the sha256 tells of weights.
    others = [] if source.is_file() else [file for file in entries(source) if file.name not in known]
    if late := newer(others, out / RECORD):
        return f"{late} is newer"
    try:
        with hashing([*weights.values()]) as found:
            pass
    except OSError as error:
        return str(error.strerror)
    same = {name: found[file.name] for name, file in weights.items()} == known
    return None if same else f"{source} has other weights"
