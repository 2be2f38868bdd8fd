"""SOURCE of the command line as local files: a directory, a GGUF file, or a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from ..carried import LICENCES, TOKENIZER_FILES
from ..errors import UserError
from ..gguf_source import find_gguf
from ..hub import not_found


def find_source(source: str, revision: str | None) -> Path:
    """The local directory of `source` (a directory or a hub id), or its GGUF file (a path, or ID:FILE.gguf).

    Downloads a hub source into the hub's cache: configs, safetensors, tokenizer and licenses, never code. `revision` is
    a branch, tag or commit of it. Raises UserError for a source that does not exist, and for a revision of a local one.
    """
    if not source:
        raise UserError("SOURCE is empty; give the directory of a checkpoint, a GGUF file, or a hub id")
    path = Path(source).expanduser()
    try:
        path.is_dir()
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}") from None
    if path.is_dir():
        if revision is not None:
            raise UserError(f"revision={revision!r} is for hub sources; {source} is a local directory")
        return path
    if path.exists():
        if find_gguf(path) is None:
            raise UserError(f"{source} is a file, and no GGUF; give the directory of a checkpoint, or a hub id")
        if revision is not None:
            raise UserError(f"revision={revision!r} is for hub sources; {source} is a local file")
        return path
    repository = source.partition(":")[0]
    if source.startswith(("/", ".", "~")) or repository.count("/") > 1:
        raise UserError(f"{source}: no such {'file' if source.endswith('.gguf') else 'directory'}")
    return _download(source, revision)


def _download(source: str, revision: str | None) -> Path:
    """The hub source in the hub's cache. Raises UserError for a repository of GGUF files, which it names."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    repository, _, file = source.partition(":")
    try:
        if file.endswith(".gguf"):
            return Path(hf_hub_download(repository, file, revision=revision))
        patterns = ["*.json", "*.safetensors", *TOKENIZER_FILES, *LICENCES]
        path = Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns="*.py"))
        if any(path.glob("*.safetensors")):
            return path
        stored = HfApi().list_repo_files(source, revision=revision)
    except Exception as error:  # the hub client raises many kinds: not found, gated, offline, no connection
        raise not_found(source, error, revision) from None
    if files := [name for name in stored if name.endswith(".gguf")]:
        raise UserError(f"{source} holds GGUF files; name the one to take: {', '.join(f'{source}:{n}' for n in files)}")
    return path
