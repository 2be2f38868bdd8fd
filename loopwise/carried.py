"""Files of a source checkpoint that the output needs beside weights and config: licences and tokenizer files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .errors import UserError

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
VOCABULARY = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken*.json", "spiece*", "*.bpe")
BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*")
TOKENIZER_FILES = (*VOCABULARY, *BESIDE)
SETTINGS = "tokenizer_config.json"


def copy_licences(path: Path, directory: Path) -> None:
    """Copy the licence files of the source `path` into `directory`. Raises UserError for a link out of `path`."""
    for pattern in LICENCES:
        for file in sorted(path.glob(pattern)):
            check_inside(file, path)
            if file.is_file() and file.suffix != ".py":
                shutil.copyfile(file, directory / file.name)


def check_inside(file: Path, path: Path) -> None:
    """Raises UserError if `file` of the checkpoint `path` is a link to a place outside of it.

    The target would be published with the output. Links into the hub's cache are allowed: the hub stores files so.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    target, root = file.resolve(), path.resolve()
    homes = [root, Path(HF_HUB_CACHE).expanduser().resolve()]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent)
    if not any(target.is_relative_to(home) for home in homes):
        raise UserError(f"{file} is a link to {target}, outside of the source; put the file itself there")


def check_tokenizer_inside(path: Path) -> None:
    """Raises UserError if a tokenizer file in the directory `path` is a link out of it."""
    for pattern in TOKENIZER_FILES:
        for file in path.glob(pattern):
            if file.suffix != ".py":
                check_inside(file, path)


def refuse_code(settings: dict[str, Any], path: Path) -> None:
    """Raises UserError if `settings`, the tokenizer_config.json of the checkpoint `path`, names remote code."""
    code = settings.get("auto_map")
    if not code:
        return
    named = (code.get("AutoTokenizer") if isinstance(code, dict) else code) or code
    named = next((part for part in named if part), named) if isinstance(named, list | tuple) else named
    raise UserError(
        f"{path / SETTINGS}: the tokenizer needs code of its own (auto_map: {named}), which is not run; save it as a "
        "tokenizer of transformers (tokenizer.json), or remove auto_map if transformers has its class"
    )
