"""A model of the command line as local files: a directory, a GGUF file, or a repository of the Hugging Face hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .carried import CARD, LICENCES, TOKENIZER_FILES
from .checkpoint import read_json
from .directory import RECORD
from .errors import UserError
from .gguf_source import find_gguf
from .hub import asking, is_hub_id, not_found

FILES = ("*.json", "*.safetensors", *TOKENIZER_FILES, *LICENCES)  # of a checkpoint; never code
SHORT = ("*.json",)  # those that describe it without its weights


def find_source(source: str, revision: str | None) -> Path:
    """The local directory of `source` (a directory or a hub id), or its GGUF file (a path, or ID:FILE.gguf).

    Downloads a hub source into the hub's cache: configs, safetensors, tokenizer, card and licenses, never code.
    `revision` is a branch, tag or commit of it. Raises UserError for a source that does not exist, and for a revision
    of a local one.
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


def find_model(model: str | Path, revision: str | None, weights: bool = True) -> Path:
    """The local directory of the recurrent-depth checkpoint `model`, a directory or a hub id.

    A hub id is downloaded into the hub's cache, without its code; its config first, so that no weights of another kind
    of model are. What is no hub id is given back as a path, for the caller to check. weights: download these, too.
    Raises UserError for a model that the hub does not give, for one that is not recurrent, and for a revision of a
    directory.
    """
    path = Path(model).expanduser()
    if not is_hub_id(str(model)):
        if revision is not None:
            raise UserError(f"revision={revision!r} is for hub models; {model} is a local path")
        return path
    with asking(lambda error: not_found(str(model), error, revision)):
        path = snapshot(str(model), revision, SHORT)
        kind = read_json(path / "config.json", f"{model}: the hub has it, but no config.json").get("model_type")
        if kind != "recurrent_depth":
            raise UserError(f"{model}: model_type is {kind!r}, not 'recurrent_depth'; loopwise convert makes one")
        return _with_card(str(model), snapshot(str(model), path.name, FILES)) if weights else path


def card_folder(model: str, revision: str | None) -> Path | None:
    """A directory with card, record and licences of `model`, a directory or a hub id; None where the hub gives none."""
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    with suppress(Exception):  # a model can be trained without its card
        if is_hub_id(model):
            return snapshot(model, revision, (CARD, RECORD, *LICENCES))
    return None


def commit_of(path: Path) -> str | None:
    """The commit of a snapshot in the hub's cache, of which `path` is the directory or a file; None elsewhere."""
    for folder in (path, *path.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.name
    return None


def _download(source: str, revision: str | None) -> Path:
    """The hub source in the hub's cache. Raises UserError for a repository of GGUF files, which it names."""
    from huggingface_hub import HfApi, hf_hub_download

    repository, _, file = source.partition(":")
    with asking(lambda error: not_found(source, error, revision)):
        if file.endswith(".gguf"):
            return Path(hf_hub_download(repository, file, revision=revision))
        path = snapshot(source, revision, FILES)
        if any(path.glob("*.safetensors")):
            return _with_card(source, path)
        stored = HfApi().list_repo_files(source, revision=revision)
    if files := [name for name in stored if name.endswith(".gguf")]:
        raise UserError(f"{source} holds GGUF files; name the one to take: {', '.join(f'{source}:{n}' for n in files)}")
    return path


def _with_card(model: str, found: Path) -> Path:
    """The snapshot `found` of `model`, with the card if the hub or the cache has it: no work depends on it."""
    from huggingface_hub import hf_hub_download

    with suppress(Exception):
        hf_hub_download(model, CARD, revision=found.name)
    return found


def snapshot(model: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The directory in the hub's cache with the files of `model` that match `patterns`. Raises the hub's errors."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, allow_patterns=[*patterns], ignore_patterns="*.py"))
