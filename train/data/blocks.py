"""The packed data of a run: built before training, written to disk, memory-mapped by every process."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loopwise.errors import UserError

from ..recipe import Data
from . import cache
from .documents import documents
from .packing import Packed, pack, split
from .reader import Reader
from .tokens import Corpus, Report, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FACTS = "facts.json"


@dataclass
class Blocks:
    """The data of a run.

    train, held_out: blocks to train on and to measure.   parts: number of blocks of each source of `train`, in order; 0
    for a streamed one.   digest: hash of all tokens and marks, compared on a resume.   greatest: the greatest token id.
    directory: where the arrays are stored.
    """

    train: Packed
    held_out: Packed | None
    parts: list[int]
    digest: str
    greatest: int
    directory: Path


def reader_of(data: Data, tokenizer: PreTrainedTokenizerBase | None) -> Reader:
    """The reader of records for the recipe section `data`."""
    skip = data.bad_records == "skip"
    return Reader(data.field, data.split, data.subset, data.chat_field is not None, skip, tokenizer)


def read(sources: list[str], data: Data, tokenizer: PreTrainedTokenizerBase, report: Report | None = None) -> Corpus:
    """The tokenized documents of `sources`, from the cache if `data` names one that has them.

    Writes the cache entry if it is missing, and the number of skipped records to stderr. Raises UserError for bad
    sources and for sources without text.
    """
    reader = reader_of(data, tokenizer)
    entry = cache.entry(sources, data, tokenizer)
    if entry and (entry / cache.DONE).is_file():
        return Corpus(*(np.load(entry / f"{field.name}.npy", mmap_mode="r") for field in fields(Corpus)))
    corpus = tokenise(documents(sources, reader), tokenizer, report)
    if reader.skipped:
        print(f"{', '.join(sources)}: {reader.skipped} bad records were skipped", file=sys.stderr)
    if not len(corpus.ends):
        raise UserError(f"{', '.join(sources)}: no text in it")
    if entry:
        cache.keep(entry, vars(corpus))
    return corpus


def build(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    report: Report | None = None,
    streamed: Sequence[Packed] = (),
) -> Blocks:
    """Tokenize, split and pack the sources of `data`, and write the arrays into `directory` for `load`.

    streamed: the first blocks of the streamed sources; they count in the digest. Raises UserError for bad sources and
    for text that does not fill one block.
    """
    length = data.sequence_length
    trained: list[Corpus] = []
    held: list[Corpus] = []
    packed, packed_marks, parts = [np.zeros((0, length), np.int32)], [np.zeros((0, length), np.uint8)], []
    for sources, later in zip(data.parts(), data.streamed(), strict=True):
        parts.append(0)
        if later:
            continue
        corpus = read(sources, data, tokenizer, report)
        for mask, target in zip(split(corpus, data.eval_fraction), (trained, held), strict=True):
            target.append(Corpus(corpus.tokens[mask], corpus.marks[mask], corpus.ends, corpus.keys))
        packed.append(pack(trained[-1].tokens, length, f"data.train ({', '.join(sources)})"))
        packed_marks.append(pack(trained[-1].marks, length, "marks"))
        parts[-1] = len(packed[-1])
    if data.eval:
        held = [read(data.eval, data, tokenizer, report)]
    directory.mkdir(parents=True, exist_ok=True)
    _save(directory / "train.npy", np.concatenate(packed))
    _save(directory / "train_marks.npy", np.concatenate(packed_marks))
    if data.held_out:
        _save(directory / "held_out.npy", pack(np.concatenate([x.tokens for x in held]), length, "the held-out text"))
        _save(directory / "held_out_marks.npy", pack(np.concatenate([x.marks for x in held]), length, "marks"))
    greatest = max(int(x.tokens.max()) for x in (*trained, *held, *streamed) if x.tokens.size)
    facts = {
        "digest": _digest(trained, held, streamed),
        "parts": parts,
        "separate": data.separate_documents,
        "greatest": greatest,
    }
    (directory / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    return load(directory)


def _digest(trained: list[Corpus], held: list[Corpus], streamed: Sequence[Packed]) -> str:
    """Hash of all arrays, in this order: training tokens, training marks, held-out tokens, held-out marks, streams."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (
        *(corpus.tokens for corpus in trained),
        *(corpus.marks for corpus in trained),
        *(corpus.tokens for corpus in held),
        *(corpus.marks for corpus in held),
        *(array for blocks in streamed for array in (blocks.tokens, blocks.marks)),
    ):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def load(directory: Path) -> Blocks:
    """The result of `build` in `directory`, memory-mapped, so that the processes of one machine share it."""
    facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))

    def packed(name: str) -> Packed:
        files = (directory / f"{name}{kind}.npy" for kind in ("", "_marks"))
        empty = not any(facts["parts"]) and name == "train"  # an empty file cannot be mapped
        arrays = (np.load(file, mmap_mode=None if empty else "r") for file in files)
        return Packed(*arrays, separate=facts["separate"])

    held_out = packed("held_out") if (directory / "held_out.npy").is_file() else None
    return Blocks(packed("train"), held_out, facts["parts"], facts["digest"], facts["greatest"], directory)


def _save(path: Path, array: np.ndarray) -> None:
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    partial.replace(path)
