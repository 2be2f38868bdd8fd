"""Sources: the local files behind a name, and the recipe keys that a source cannot use."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from loopwise.errors import UserError
from loopwise.input_files import check_inside, check_regular
from loopwise.unused import Unused

from .. import tasks
from .snapshot import RECORDS, files_of_split, is_snapshot, kind_of
from .tables import is_saved_dataset, one_line_errors


def check_exists(source: str, path: Path) -> None:
    """Raises UserError if `source` looks like a path and does not exist, before the hub is asked for it."""
    if not path.exists() and (source.startswith((".", "/", "~")) or path.suffix):
        raise UserError(f"{source}: no such file or directory")


def files_of(source: str, split: str = "train", subset: str | None = None) -> list[Path] | None:
    """The local files of `source`, only those of `split` if it has splits. None for a dataset or a generated task."""
    if tasks.is_task(source):
        return None
    path = Path(source).expanduser()
    check_regular(path)
    if path.is_file():
        return [path]
    if path.is_dir() and not is_saved_dataset(path):
        files = sorted(_walk(path))
        if files and _has_splits(path, files):
            with one_line_errors(source):
                files = files_of_split(path, split, subset)
        return _checked(files, path)
    if any(character in source for character in "*?["):
        named = next(n for n, part in enumerate(path.parts) if any(character in part for character in "*?["))
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        return _checked([p for p in found if not p.is_dir()], Path(*path.parts[:named]))
    return None


def _checked(files: list[Path], folder: Path) -> list[Path]:
    """The `files` of `folder`. Raises UserError for one that is not regular, or is a link out of the folder."""
    inside: set[Path] = set()
    for file in files:
        check_regular(file)
        if file.parent not in inside or file.is_symlink():  # which resolves a path: slow for a hundred thousand
            check_inside(file, folder)
        inside.add(file.parent)
    return [file for file in files if file.is_file()]


def _has_splits(path: Path, files: list[Path]) -> bool:
    with one_line_errors(str(path)):
        return is_snapshot(path, files)


def _walk(directory: Path) -> Iterator[Path]:
    for here, names, files in os.walk(directory):
        names[:] = [name for name in names if not name.startswith((".", "__pycache__"))]
        yield from (Path(here, name) for name in files if not name.startswith("."))


def unused(sources: list[str], split: str, subset: str | None, prefix: str = "") -> Iterator[Unused]:
    """The recipe keys, each behind `prefix`, that have no effect on `sources`. Raises UserError for unreadable ones."""
    splits = subsets = fields = named = local = False
    if prefix and all(map(tasks.is_task, sources)):
        yield Unused(f"{prefix}chat_field", (), "records of generated tasks are always conversations")
    for source in sources:
        if tasks.is_task(source):  # its parameters take the place of these keys
            continue
        path = Path(source).expanduser()
        files = files_of(source, split, subset)
        snapshot = path.is_dir() and not is_saved_dataset(path) and _has_splits(path, sorted(_walk(path)))
        hub = files is None and not path.exists()
        splits |= hub or snapshot or (path / "dataset_dict.json").is_file()
        subsets |= hub or snapshot
        local |= files is not None
        fields |= files is None or any(kind_of(file, strict=False) in RECORDS for file in files)
        named |= path.is_file()
    if not splits and all(map(tasks.is_task, sources)):
        yield Unused(f"{prefix}split", (), f"the split of a generated task stands in its source, as {sources[0]}")
    elif not splits:
        plain = "files, folders of files without splits, and single saved datasets"
        yield Unused(f"{prefix}split", (), f"{plain} have no splits; name the files of the split")
    if not subsets:
        yield Unused(f"{prefix}subset", (), "it belongs to datasets of the hub, or to folders with a dataset card")
    if not fields:
        yield Unused(f"{prefix}text_field", (), "text files and generated tasks have no fields")
    if not fields and not named:
        why = "texts of a folder that are not UTF-8 are always left out, and generated tasks have no bad records"
        yield Unused(f"{prefix}bad_records", (), why)
    if prefix and not local:
        yield Unused(f"{prefix}cache", (), "it keeps tokens of local files, and there are none")
