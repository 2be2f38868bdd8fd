"""Caches of compiled code, in folders that no other user can write: torch reads pickles from its own."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from pathlib import Path

from .errors import UserError

# environment variable: folder below Loopwise's own
FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "VLLM_CACHE_ROOT": "vllm"}


def use_private_caches() -> None:
    """Let torch, Triton and vLLM keep compiled code in `~/.cache/loopwise`, or below XDG_CACHE_HOME.

    Their own environment variables name other folders. Where none can be made there, as on a read-only root, the folder
    is a temporary one of this process. Sets environment variables, which child processes inherit. Raises UserError for
    a folder that another user owns, can write to or can replace.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        base = base.expanduser()
    except RuntimeError:  # neither HOME nor an entry of this user in the system's list
        base = Path("/nonexistent")
    for name, folder in FOLDERS.items():
        given = os.environ.get(name)
        path = Path(given).absolute() if given else base / "loopwise" / folder
        if not given and not _made(path):
            path = _temporary() / folder
            _made(path)
        _check(name, path)
        os.environ[name] = str(path)


def _made(path: Path) -> bool:
    """True if the folder `path` exists and can be written. Makes what is missing of it, with mode 0700."""
    try:
        for part in [*reversed(path.parents), path]:
            if not part.exists():
                part.mkdir(0o700, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.W_OK)


_kept: list[Path] = []


def _temporary() -> Path:
    """A new folder that goes with this process; the same one at each call. `/nonexistent` where none can be made."""
    if not _kept:
        try:
            _kept.append(Path(tempfile.mkdtemp(prefix="loopwise-")))
            atexit.register(_remove, _kept[0], os.getpid())
        except OSError:
            _kept.append(Path("/nonexistent"))  # torch names it where it compiles
    return _kept[0]


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)


def _check(name: str, path: Path) -> None:
    """Raises UserError if another user can put files into `path`, or put another folder in its place."""
    if not hasattr(os, "getuid"):
        return
    path = path.resolve()
    for part in (path, *path.parents):
        try:
            found = part.stat()
        except OSError:
            continue  # it will be made by this user, or not at all
        others = found.st_mode & (stat.S_IWOTH | (stat.S_IWGRP if found.st_gid != found.st_uid else 0))
        sticky = part != path and found.st_mode & stat.S_ISVTX  # there, only owners replace what is theirs
        owners = (os.getuid(),) if part == path else (os.getuid(), 0)
        if found.st_uid not in owners or (others and not sticky):
            raise UserError(
                f"{part}: another user can change it, and code is run from the cache in it: name a folder of your own "
                f"by {name}, or by XDG_CACHE_HOME"
            )
