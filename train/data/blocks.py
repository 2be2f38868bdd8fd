"""The packed data of a run: built before training, written to disk, memory-mapped by every process."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from loopwise.disk import naming
from loopwise.errors import UserError
from loopwise.foreign import ALONE, ANSWERS, ARRAY, FACTS, HELD_OUT, MARKS, PARTIAL, TRAIN

from ..recipe import Data
from . import cache
from .answers import Answers, Grouped, Numbered, alone
from .documents import documents
from .packing import Packed, fill, longer, pack, split, whole, with_starts
from .reader import Reader
from .tokens import PAD, Corpus, Report, joined, recurrences_of, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Blocks:
    """The data of a run.

    train, held_out: blocks to train on and to measure.   answers: those of `held_out`, if it has any.   parts: number
    of blocks of each source of `train`, in order; 0 for a streamed one.   digest: hash of all tokens and marks, for
    resumes.   greatest: the greatest token id.   directory: where the arrays are stored.
    """

    train: Packed
    held_out: Packed | None
    answers: Answers | None
    parts: list[int]
    digest: str
    greatest: int
    directory: Path


def reader_of(data: Data, tokenizer: PreTrainedTokenizerBase | None) -> Reader:
    """The reader of records for the recipe section `data`."""
    skip = data.bad_records == "skip"
    chat = data.chat_field is not None
    return Reader(data.field, data.split, data.subset, chat, skip, tokenizer, data.recurrences)


def read_answers(
    sources: list[str], data: Data, tokenizer: PreTrainedTokenizerBase, report: Report | None
) -> tuple[Corpus, Numbered | None]:
    """(`read`, the answers of its documents if some are measured). With `data.group`, the cache is not used.

    Raises UserError for a record without the field `data.group`, or with another number of groups than of answers.
    """
    if not data.measures_answers:
        return read(sources, data, tokenizer, report), None
    name, groups = ", ".join(sources), []
    if data.group is None:
        corpus = read(sources, data, tokenizer, report)
    else:
        reader = Grouped(**vars(reader_of(data, tokenizer)), group=data.group)

        def kept() -> Iterator[Any]:
            for document, group in documents(sources, reader):
                groups.append(group)
                yield document

        corpus = _tokenised(kept(), reader, sources, tokenizer, report)
    return corpus, Numbered.of(corpus, groups, name)


def read(sources: list[str], data: Data, tokenizer: PreTrainedTokenizerBase, report: Report | None = None) -> Corpus:
    """The tokenized documents of `sources`, from the cache if `data` names one that has them.

    Writes the cache entry if it is missing, and the number of skipped records to stderr. Raises UserError for bad
    sources and for sources without text.
    """
    reader = reader_of(data, tokenizer)
    entry = cache.entry(sources, data, tokenizer)
    if entry and (entry / cache.DONE).is_file():
        return Corpus(*(np.load(entry / f"{field.name}.npy", mmap_mode="r") for field in fields(Corpus)))
    corpus = _tokenised(documents(sources, reader), reader, sources, tokenizer, report)
    if entry:
        cache.keep(entry, vars(corpus))
    return corpus


def _tokenised(
    texts: Iterable[Any],
    reader: Reader,
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    report: Report | None,
) -> Corpus:
    corpus = tokenise(texts, tokenizer, report)
    if reader.skipped:
        print(f"{', '.join(sources)}: {reader.skipped} bad records were skipped", file=sys.stderr)
    if not len(corpus.ends):
        raise UserError(f"{', '.join(sources)}: no text in it")
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
    trained: list[Corpus] = []
    held: list[Corpus] = []
    numbered: list[Numbered | None] = []
    packed, parts = [_empty(data)], []
    for sources, later in zip(data.parts(), data.streamed(), strict=True):
        parts.append(0)
        if later:
            continue
        corpus, answers = read_answers(sources, data, tokenizer, report)
        masks = split(corpus, data.eval_fraction)
        for mask, target in zip(masks, (trained, held), strict=True):
            target.append(corpus.kept(mask))
        numbered.append(answers and answers.kept(masks[1]))
        name = f"data.train ({', '.join(sources)})"
        name_long(trained[-1], data, name)
        packed.append(packed_documents(trained[-1], data, tokenizer, name))
        parts[-1] = len(packed[-1])
    if data.eval:
        corpus, answers = read_answers(data.eval, data.model_copy(update={"recurrences": None}), tokenizer, report)
        held, numbered = [corpus], [answers]
    if data.recurrences and not any(recurrences_of(x.marks).any() for x in (*trained, *streamed)):
        raise UserError(f"data.recurrences.field={data.recurrences.field} has no effect: no record has this field")
    directory.mkdir(parents=True, exist_ok=True)
    _save(directory, TRAIN, *([getattr(x, kind) for x in packed] for kind in ("tokens", "marks")))
    found = _held_out(joined(held), [x for x in numbered if x], data, tokenizer, directory) if data.held_out else None
    greatest = max(int(x.tokens.max()) for x in (*trained, *held, *streamed) if x.tokens.size)
    facts = {
        "digest": _digest(trained, held, streamed),
        "parts": parts,
        "separate": data.separate_documents,
        "padded": data.padded,
        "recurrences": data.recurrences is not None,
        "greatest": greatest,
        "groups": found.groups if found else [],
        "files": sorted(path.name for path in directory.iterdir()),
    }
    (directory / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    return load(directory)


def _held_out(
    corpus: Corpus,
    numbered: list[Numbered],
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
) -> Answers | None:
    """Write the held-out blocks and their answers into `directory`, and return the answers."""
    name = "the held-out text"
    name_long(corpus, data, name)
    blocks = packed_documents(corpus, data, tokenizer, name)
    _save(directory, HELD_OUT, [blocks.tokens], [blocks.marks])
    if not numbered:
        return None
    together = Numbered.joined(numbered)
    numbers, length = together.begun(corpus, data.sequence_length), data.sequence_length
    if data.padded and data.separate_documents:
        bins = whole(corpus, length, data.packing_strategy, data.long_documents, name)
    elif bins := alone(corpus, numbers, length, data.long_documents, name):
        length = max(end - begin for [(begin, end)] in bins)
        eos = cast(int, tokenizer.eos_token_id)
        _save(directory, ALONE, [fill(corpus.tokens, bins, length, eos)], [fill(corpus.marks, bins, length, PAD)])
    found = together.in_blocks(fill(numbers, bins, length, 0)) if bins else None
    count = len(found.groups) if found else 0
    if left := np.count_nonzero(np.unique(together.numbers)) - count:  # a share of training has the other numbers
        print(f"{name}: {left} of {count + left} answers are left out, as their records are cut", file=sys.stderr)
    if found:
        with naming(directory / ANSWERS):
            np.save(directory / ANSWERS, found.numbers)
    return found


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


def complete(directory: Path) -> bool:
    """True if `directory` has all files that `build` wrote there."""
    try:
        files = json.loads((directory / FACTS).read_text(encoding="utf-8")).get("files", [])  # earlier releases: none
    except (OSError, ValueError):
        return False
    return all((directory / name).is_file() for name in files)


def load(directory: Path) -> Blocks:
    """The result of `build` in `directory`, memory-mapped, so that the processes of one machine share it."""
    facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))

    def packed(name: str, **keys: bool) -> Packed:
        files = (directory / f"{name}{kind}{ARRAY}" for kind in ("", MARKS))
        empty = not any(facts["parts"]) and name == TRAIN  # an empty file cannot be mapped
        tokens, marks = (np.load(file, mmap_mode=None if empty else "r") for file in files)
        by_record = name == TRAIN and facts.get("recurrences", False)
        kind = {"separate": facts["separate"], "padded": facts.get("padded", False), "by_record": by_record}
        return Packed(tokens, marks, **{**kind, **keys})

    held_out = packed(HELD_OUT) if (directory / f"{HELD_OUT}{ARRAY}").is_file() else None
    answers = None
    if (file := directory / ANSWERS).is_file():
        rows = packed(ALONE, separate=False, padded=True) if (directory / f"{ALONE}{ARRAY}").is_file() else None
        answers = Answers(np.load(file, mmap_mode="r"), facts["groups"], rows)
    return Blocks(packed(TRAIN), held_out, answers, facts["parts"], facts["digest"], facts["greatest"], directory)


def _empty(data: Data) -> Packed:
    return Packed(*(np.zeros((0, data.sequence_length), kind) for kind in (np.int32, np.uint8)), separate=False)


def packed_documents(
    corpus: Corpus, data: Data, tokenizer: PreTrainedTokenizerBase, name: str, may_be_none: bool = False
) -> Packed:
    """The blocks of `corpus` under the packing of `data`.

    may_be_none: no whole document fits, in a part of a text. Raises UserError, led by `name`, if no block is filled
    otherwise, and for a document that is too long if `data` says so.
    """
    length = data.sequence_length
    by_record = data.recurrences is not None
    if not data.padded:
        tokens, marks = (pack(part, length, name) for part in (corpus.tokens, corpus.marks))
        return Packed(tokens, marks, data.separate_documents, by_record=by_record)
    bins = whole(corpus, length, data.packing_strategy, data.long_documents, name, may_be_none)
    return Packed(
        fill(corpus.tokens, bins, length, cast(int, tokenizer.eos_token_id)),
        fill(with_starts(corpus.marks, bins), bins, length, PAD),
        data.separate_documents,
        padded=True,
        by_record=by_record,
    )


def name_long(corpus: Corpus, data: Data, name: str) -> bool:
    """Print a line to stderr, led by `name`, if whole documents are longer than a block. Returns True if they are."""
    long = longer(corpus, data.sequence_length) if data.padded and data.long_documents != "stop" else 0
    if long:
        cut = "cut into blocks" if data.packing_strategy == "bfd_split" else "cut to their first block"
        cut = "left out" if data.long_documents == "skip" else cut
        size = f"sequence_length={data.sequence_length} tokens"
        print(f"{name}: {long} of {len(corpus.ends)} documents are longer than {size}: {cut}", file=sys.stderr)
    return long > 0


def _save(directory: Path, name: str, tokens: list[np.ndarray], marks: list[np.ndarray]) -> None:
    """Write `name`.npy and `name`_marks.npy, each joined from several arrays of blocks.

    name: of `loopwise.foreign`, by which the files count as those of a run.
    """
    for kind, arrays in (("", tokens), (MARKS, marks)):
        path, partial = directory / f"{name}{kind}{ARRAY}", directory / f"{name}{kind}{PARTIAL}"
        with naming(path):
            np.save(partial, np.concatenate(arrays))
            partial.replace(path)
