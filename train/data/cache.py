"""Tokenised sources that are kept between runs: a folder for each, named by all that its tokens depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from loopwise.directory import begin, beside, remove, settle
from loopwise.errors import UserError

from .recipe import Data
from .sources import files_of

FORMAT = 3  # of what is kept: goes up where the same files give other tokens or marks
DONE = "done"  # written last: a killed run leaves no half of an entry that would be taken for whole


def entry(sources: list[str], data: Data, tokenizer: Any) -> Path | None:
    """Where the tokens of `sources` are kept: None without `data.cache`, or for a source that is no local file."""
    if data.cache is None:
        return None
    files = [path for source in sources for path in files_of(source, data.split, data.subset) or [None]]
    if None in files:
        return None
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = backend.to_str() if backend is not None else repr(tokenizer)
    keys = [stats, data.field, data.chat_field is not None, data.bad_records, said, tokenizer.eos_token_id]
    keys += [getattr(tokenizer, "chat_template", None), FORMAT]
    return Path(data.cache).expanduser() / hashlib.blake2b(json.dumps(keys).encode(), digest_size=16).hexdigest()


def keep(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Leave `arrays` in `folder`, whole or not at all. Raises UserError where they cannot be written there."""
    partial = beside(folder, "partial")
    try:
        settle(folder)
        begin(partial)
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        (partial / DONE).write_text("", encoding="utf-8")
        if not (folder / DONE).is_file():  # else another run has kept the same meanwhile
            remove(folder)
            partial.replace(folder)
    except OSError as error:
        raise UserError(f"data.cache={folder.parent}: cannot be written ({error.strerror or error})") from None
    finally:
        remove(partial)
