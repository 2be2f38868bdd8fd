"""Tokenized sources that are kept between runs: one folder each, named by a hash of all that its tokens depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loopwise.directory import begin, beside, remove, settle
from loopwise.disk import sync_tree
from loopwise.errors import UserError
from loopwise.lock import locked

from ..recipe import Data
from .sources import files_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 3  # version of an entry; raised when the same files give other tokens or marks
WAIT = 600.0  # seconds for another run to write an entry
DONE = "done"  # written last, so that a killed run leaves no entry that looks complete


def entry(sources: list[str], data: Data, tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """The folder for the tokens of `sources`. None without `data.cache`, or if a source is not a local file."""
    if data.cache is None:
        return None
    files = [path for source in sources for path in files_of(source, data.split, data.subset) or [None]]
    if None in files:
        return None
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else repr(tokenizer)
    keys = [stats, data.field, data.chat_field is not None, data.bad_records, vocabulary, tokenizer.eos_token_id]
    keys += [getattr(tokenizer, "chat_template", None), FORMAT]
    keys += [data.recurrences.model_dump()] if data.recurrences else []
    return Path(data.cache).expanduser() / hashlib.blake2b(json.dumps(keys).encode(), digest_size=16).hexdigest()


def keep(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` into `folder`, whole or not at all; nothing where another run has written it meanwhile.

    Waits for another run that writes it. Raises UserError if they cannot be written there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    with locked(folder.resolve(), wait=WAIT):
        if not (folder / DONE).is_file():
            _write(folder, arrays)


def _write(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    partial = beside(folder, "partial")
    try:
        settle(folder)
        begin(partial)
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        (partial / DONE).write_text("", encoding="utf-8")
        sync_tree(partial)
        remove(folder)
        partial.replace(folder)
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        remove(partial, made=True)


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"data.cache={folder.parent}: cannot be written ({error.strerror or error})")
