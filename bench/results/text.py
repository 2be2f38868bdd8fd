"""Records of text to learn from and to hold out, and a tokenizer of characters."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .commands import Failed, read, write

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
LEAST = 1_000_000  # characters
MOST = 6_000_000  # of which the longest run reads half
HELD_OUT = 150_000


def prepare(folder: Path, text: Path | None, most: int = MOST) -> None:
    """Write train.jsonl, held_out.jsonl and tokenizer/ into `folder`, unless they are there.

    text: a file or a folder; None: Python's standard library.   most: about so many characters to learn from. Every
    20th document is held out, and of it 4,000 characters. Raises Failed for too little text, and for another text than
    that which is there.
    """
    made, arguments = folder / "made.json", {"text": text and str(text.resolve()), "most": most}
    if (folder / "tokenizer" / "tokenizer.json").is_file():
        check_same(made, arguments)
        return
    folder.mkdir(parents=True, exist_ok=True)
    kept: list[str] = []
    held: list[str] = []
    size = {True: 0, False: 0}
    drop = {ord(c): None for c in map(chr, range(32)) if c not in CHARACTERS}
    for number, document in enumerate(documents(text)):
        clean = document.encode("ascii", "ignore").decode().translate(drop)
        hold = number % 20 == 10 and size[True] < HELD_OUT
        part = clean[1000:5000] or clean if hold else clean
        (held if hold else kept).append(part)
        size[hold] += len(part)
        if size[False] >= most:
            break
    if size[False] < min(LEAST, most):
        raise Failed(f"{text}: {size[False]:,} characters of text; at least {LEAST:,} are needed")
    for name, texts in (("train", kept), ("held_out", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    vocabulary = {token: i for i, token in enumerate(["<eos>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    write(made, arguments)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder / "tokenizer")


def check_same(file: Path, arguments: dict[str, Any]) -> None:
    """Raises Failed if `file`, of an earlier call, has other `arguments`."""
    if file.is_file() and (known := read(file)) != arguments:
        name = next(name for name, value in arguments.items() if known.get(name) != value)
        raise Failed(
            f"{file.parent} has a text of {name}={known.get(name)}, and now it is {arguments[name]}; choose another OUT"
        )


def documents(text: Path | None) -> Iterator[str]:
    """The documents of a folder, the paragraphs of a file, or the modules of Python's standard library, shuffled."""
    if text is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "site-packages", "idle_test", "lib2to3"}
        files = [path for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts)]
    elif text.exists():
        files = [path for path in sorted(text.rglob("*")) if path.is_file()] if text.is_dir() else [text]
    else:
        raise Failed(f"{text}: no such file or directory")
    random.Random(0).shuffle(files)
    for file in files:
        try:
            document = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        parts = document.split("\n\n") if text and text.is_file() else [document]
        yield from (part for part in parts if part.strip())
