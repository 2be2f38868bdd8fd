"""The state of the stand-in for the hub in tests/helpers/hub.py: models, their commits, and what was asked."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Repository:
    """A model: its commits, oldest first, each a map of paths to bytes, and the commits of its branches."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with `files` to `branch`. Returns its id."""
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, or of a commit."""
        return self.refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)]


@dataclass
class Hub:
    """The state of the stand-in.

    refuse: (method, pattern of the path) -> status, or status and the hub's name of the error.   all_public: new
    repositories are public, whatever is asked for.   sent: of downloads, the file, the bytes, and True for the whole
    file.   whole_files: ranges are not answered, and the file comes instead.   created: bodies of the requests that
    made repositories.   large: files by sha256.   cut: large files after which uploads are refused; None for never.
    held: until it is set, these uploads wait instead, and then have no answer.
    """

    url: str = ""
    models: dict[str, Repository] = field(default_factory=dict)
    refuse: dict[tuple[str, str], int | tuple[int, str]] = field(default_factory=dict)
    all_public: bool = False
    seen: list[tuple[str, str]] = field(default_factory=list)
    sent: list[tuple[str, int, bool]] = field(default_factory=list)
    whole_files: bool = False
    created: list[dict[str, Any]] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    cut: int | None = None
    held: threading.Event | None = None

    def add(self, name: str, folder: Path, branch: str = "main") -> str:
        """Put the files of `folder` on a branch of the model `name`. Returns the commit."""
        return self.models.setdefault(name, Repository()).commit(files_of(folder), branch)

    def asked(self, method: str, pattern: str) -> int:
        """The number of requests whose path matches."""
        return sum(one == method and bool(re.search(pattern, path)) for one, path in self.seen)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", "tokenizer.json"))


def etag(path: str, data: bytes) -> str:
    """The id of a file: git's of a small one, the sha256 of a large one."""
    if is_large(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
