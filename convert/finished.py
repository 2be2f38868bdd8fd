"""An OUT that is there already: whether it is what a command would make, so that it needs no second time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..directory import RECORD, is_whole, record_of
from ..find_source import commit_of
from ..input_files import newer
from .hashes import hashing


def is_done(out: Path, name: str, source: Path, asked: dict[str, Any], check: bool) -> bool:
    """True where the directory `out` is whole, was made from `source` as it is now, and by what is `asked`.

    name: the source as the command line has it.   asked: entries of the record, as JSON has them.   check: it has to be
    verified. A commit of the hub is known to be the same. The files of a directory are, if none is newer than `out` and
    the weights have the recorded sha256.
    """
    record = record_of(out)
    made = record.get("source")
    if not is_whole(out) or not isinstance(made, dict) or made.get("id") != name:
        return False
    if check and not record.get("max_dlogit_by_dtype"):
        return False
    if any(record.get(key) != value for key, value in asked.items()):
        return False
    commit = commit_of(source)
    return commit == made.get("revision") if commit else _is_unchanged(source, made.get("sha256"), out)


def _is_unchanged(source: Path, known: Any, out: Path) -> bool:
    """True if the weights of `source`, a directory or a file, have the `known` sha256, and no other file of it is newer
    than `out`."""
    if not isinstance(known, dict) or not known:
        return False
    files = [file for file in (source.iterdir() if source.is_dir() else [source]) if file.is_file()]
    # A hard link, as `calibrate` makes, changes a file's st_ctime; the sha256 tells of weights.
    others = [file for file in files if file.name not in known]
    if newer(others, out / RECORD) or not {*known} <= {file.name for file in files}:
        return False
    try:
        with hashing([file for file in files if file.name in known]) as found:
            pass
    except OSError:
        return False
    return found == known
