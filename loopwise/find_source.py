"""A model of the command line as local files: a directory, a GGUF file, or a repository of the Hugging Face hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .carried import CARD, LICENCES, TOKENIZER_FILES
from .checkpoint import files_in, read_json, weight_names
from .directory import RECORD
from .errors import UserError
from .gguf_source import find_gguf
from .hub import asking, is_hub_id, not_found, snapshot_of

FILES = ("*.json", *TOKENIZER_FILES, *LICENCES)  # of a checkpoint, without weights; never code
SHORT = ("*.json",)  # those that describe it


@dataclass(frozen=True)
class HubWeights:
    """The weight files of the hub's `model` that are not in its cache yet.

    folder: the snapshot in the cache with its other files, by the name of the commit.   stored: the names of all files
    on the hub.
    """

    model: str
    folder: Path
    stored: list[str]

    @property
    def commit(self) -> str:
        """The commit of the files."""
        return self.folder.name

    def names(self) -> list[str]:
        """The names of the weight files. Raises UserError as `weight_names` does."""
        return weight_names(self.folder, self.stored)

    def fetch(self) -> None:
        """Download the weight files, and no others. Raises UserError where the model has none, or the hub refuses."""
        with named(self.model, self.folder), asking(lambda error: not_found(self.model, error, self.commit)):
            snapshot(self.model, self.commit, tuple(glob.escape(name) for name in self.names()))


def find_source(source: str, revision: str | None) -> tuple[Path, HubWeights | None]:
    """The local directory of `source` (a directory or a hub id), or its GGUF file (a path, or ID:FILE.gguf).

    The files of a hub source are downloaded into the hub's cache: configs, tokenizer, card and licenses, never code.
    Its weights are not, as its config may show that they are of no use: the second value has those that the cache
    lacks. A GGUF file is its own config, so it is downloaded whole. `revision` is a branch, tag or commit. Raises
    UserError for a source that does not exist, and for a revision of a local one.
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
        return path, None
    if path.exists():
        if find_gguf(path) is None:
            raise UserError(f"{source} is a file, and no GGUF; give the directory of a checkpoint, or a hub id")
        if revision is not None:
            raise UserError(f"revision={revision!r} is for hub sources; {source} is a local file")
        return path, None
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
        if not weights:
            return path
        path = _with_card(str(model), snapshot(str(model), path.name, FILES))
        if there := _weights_on_hub(str(model), path):
            there.fetch()
        return path


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
    found = snapshot_of(path)
    return found.name if found else None


@contextmanager
def named(source: str, found: Path) -> Iterator[None]:
    """A block whose errors about `found`, the place of `source` in the hub's cache, name `source`."""
    try:
        yield
    except UserError as error:
        if commit_of(found) is None:
            raise
        raise UserError(str(error).replace(str(found), source)) from error


def _download(source: str, revision: str | None) -> tuple[Path, HubWeights | None]:
    """The hub source in the hub's cache, and its weights where they are not there. Raises UserError for a repository of
    GGUF files, which it names."""
    from huggingface_hub import hf_hub_download

    repository, _, file = source.partition(":")
    with asking(lambda error: not_found(source, error, revision)):
        if file.endswith(".gguf"):
            found = Path(hf_hub_download(repository, file, revision=revision))
            with suppress(Exception):  # no work depends on them
                snapshot(repository, commit_of(found), (CARD, *LICENCES))
            return found, None
        path = _with_card(source, snapshot(source, revision, FILES))
        there = _weights_on_hub(source, path)
    stored = there.stored if there else []
    files = [name for name in stored if name.endswith(".gguf")]
    if files and not any("/" not in name and name.endswith(".safetensors") for name in stored):
        raise UserError(f"{source} holds GGUF files; name the one to take: {', '.join(f'{source}:{n}' for n in files)}")
    return path, there


def _weights_on_hub(model: str, path: Path) -> HubWeights | None:
    """The weights of `model`, whose snapshot in the cache is `path`; None where the cache has them. Raises the hub's
    errors where it lacks them, and the hub cannot be asked."""
    from huggingface_hub import HfApi

    with suppress(UserError):  # which the weights on the hub raise again
        weight_names(path, files_in(path))
        return None
    return HubWeights(model, path, HfApi().list_repo_files(model, revision=path.name))


def _with_card(model: str, found: Path) -> Path:
    """The snapshot `found` of `model`, with the card if the hub or the cache has it: no work depends on it."""
    from huggingface_hub import hf_hub_download

    with suppress(Exception):
        hf_hub_download(model, CARD, revision=found.name)
    return found


def snapshot(model: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The directory in the hub's cache with the files of `model` that match `patterns`. Raises the hub's errors.

    Folders are left out where a pattern names none: they hold other forms of the model (`original/`), or checkpoints.
    """
    from huggingface_hub import snapshot_download

    left_out = ["*.py", *(f"*/{pattern}" for pattern in patterns if "/" not in pattern)]
    return Path(snapshot_download(model, revision=revision, allow_patterns=[*patterns], ignore_patterns=left_out))
