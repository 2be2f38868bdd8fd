"""Files that others may have made: only regular files are read, and of a directory only those that lie in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import UserError
from .hub import snapshot_of

KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


def check_regular(file: Path, name: str | None = None) -> None:
    """Raises UserError if `file`, or what it links to, is a FIFO, a device or a socket: some never end.

    name: the file in the message. A file that does not exist passes, and so does a directory.
    """
    try:
        kind = KINDS.get(stat.S_IFMT(os.stat(file).st_mode))
    except OSError:
        return
    if kind:
        raise UserError(f"{name or file} is {kind}; only regular files are read")


def check_inside(file: Path, path: Path) -> None:
    """Raises UserError if `file` of the directory `path` is a link to a place outside of it.

    The target would be read, and may be published with the output. Links into the hub's cache are allowed: the hub
    stores files so.
    """
    target, root = _resolved(file), path.resolve()
    if target.is_relative_to(root):
        return
    snapshot = snapshot_of(root)
    homes = [_hub_cache(), *([snapshot.parent.parent / "blobs"] if snapshot else [])]
    if not any(target.is_relative_to(home) for home in homes):
        raise UserError(f"{file} is a link to {target}, outside of the source; put the file itself there")


def check_tree(path: Path) -> None:
    """Raises UserError for a file below the directory `path` that is not regular, or is a link out of it.

    A link to a folder within `path` passes: what is in the folder is looked at there.
    """
    for here, folders, names in os.walk(path):
        for name in (*folders, *names):
            check_regular(Path(here, name))
            check_inside(Path(here, name), path)


def is_plain_name(name: Any) -> bool:
    """True for the name of a file or folder in a directory: no path, and not that directory or the one above."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\0" not in name


def check_entries(path: Path) -> None:
    """Raises UserError for a file in the directory `path` that is not regular, or is a link out of it.

    Folders in it are not looked into; a GGUF file may be linked, as it is read only if it is one.
    """
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        for entry in entries:
            file = path / entry.name
            check_regular(file)
            if entry.is_symlink() and file.is_file() and file.suffix != ".gguf":
                check_inside(file, path)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from None


def newer(files: Iterable[Path], than: Path) -> Path | None:
    """The first of `files` that is there and was changed after the file `than` was written; None without one.

    A copy that keeps its time of change has a new inode's, st_ctime.
    """
    written = than.stat().st_mtime
    stats = ((file, file.stat()) for file in files if file.is_file())
    return next((file for file, stat in stats if max(stat.st_mtime, stat.st_ctime) > written), None)


def _resolved(file: Path) -> Path:
    try:
        return file.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or error}") from None


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).expanduser().resolve()
