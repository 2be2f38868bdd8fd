"""Text to packed blocks of tokens: tokenise, split off the held-out part, pack.

Tokens are int32. One flat array holds all documents, each ended by EOS; blocks are cut out of it without regard to
document ends, and what does not fill a last block is dropped. Beside the tokens stand marks, uint8: `LEARN` for those
that a conversation's assistant says (of texts, all), `START` for the first of a document.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from loopwise.errors import UserError

from . import cache
from .recipe import Data
from .sources import Reader, documents

FACTS = "facts.json"

PIECE = 1 << 20  # characters; a longer document is tokenised in pieces, as memory and time grow with the text
BATCH = 1 << 23  # characters handed to the tokenizer at once

LEARN, START = 1, 2

Report = Callable[[int, int], None]  # (documents, tokens) so far


@dataclass
class Corpus:
    """Tokenised documents. tokens [N] int32; marks [N] uint8; ends [documents] int64; keys [documents] uint64, a hash
    of each text."""

    tokens: np.ndarray
    marks: np.ndarray
    ends: np.ndarray
    keys: np.ndarray


def tokenise(texts: Iterable[Any], tokenizer: Any, report: Report | None = None) -> Corpus:
    """Token ids of every document, a text or an encoded conversation: of a text what the tokenizer puts before it (BOS
    or nothing), the text, EOS; of a conversation its chat template, EOS.

    Raises UserError where the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, which separates packed documents; set its eos_token")
    prefix = _prefix(tokenizer)
    parts: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    ends: list[int] = []
    keys: list[int] = []
    total = 0
    for batch in _batches(texts):
        for text, ids, learned in _encoded(batch, tokenizer, prefix):
            parts.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int32))
            learned[0] |= START
            marks.append(learned)
            total += len(parts[-1])
            ends.append(total)
            keys.append(int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()))
        if report:
            report(len(ends), total)
    return Corpus(
        np.concatenate(parts) if parts else np.zeros(0, np.int32),
        np.concatenate(marks) if marks else np.zeros(0, np.uint8),
        np.array(ends, np.int64),
        np.array(keys, np.uint64),
    )


def _encoded(batch: list[Any], tokenizer: Any, prefix: list[int]) -> Iterator[tuple[str, list[int], np.ndarray]]:
    """(text that tells the document from others, token ids, marks of these and of the EOS that follows)."""
    texts = [document for document in batch if isinstance(document, str)]
    encoded = iter(_encode(tokenizer, [text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE)]))
    for document in batch:
        if isinstance(document, str):
            pieces = range(0, len(document), PIECE)
            ids = [*prefix, *(part for _ in pieces for part in next(encoded))]
            yield document, ids, np.full(len(ids) + 1, LEARN, np.uint8)
        else:
            yield document.key, document.ids, np.array([*document.said, document.ended], np.uint8) * LEARN


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: [BOS] for some model families."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return next((full[:i] for i in range(len(full)) if full[i : i + len(bare)] == bare), [])


def _batches(documents: Iterable[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document) if isinstance(document, str) else len(document.key)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Any, pieces: list[str]) -> list[list[int]]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "encode_batch_fast"):  # no offsets and masks, which nothing here needs
        return [encoding.ids for encoding in backend.encode_batch_fast(pieces, add_special_tokens=False)]
    return tokenizer(pieces, add_special_tokens=False)["input_ids"]


def split(corpus: Corpus, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens [N] are for training, and which are held out. Documents are held out in the order of their keys
    until they make up `fraction`.

    So the choice depends on the texts alone. Where that would be over twice the `fraction` (few, long documents), the
    last `fraction` of all tokens is held out instead.
    """
    total = len(corpus.tokens)
    wanted = fraction * total
    if wanted < 1:
        return np.ones(total, bool), np.zeros(total, bool)
    lengths = np.diff(corpus.ends, prepend=0)
    order = np.argsort(corpus.keys, kind="stable")
    reached = np.cumsum(lengths[order])
    count = int(np.searchsorted(reached, wanted)) + 1
    if reached[min(count, len(reached)) - 1] > 2 * wanted:
        mask = np.arange(total) >= total - int(wanted)
    else:
        held = np.zeros(len(lengths), bool)
        held[order[:count]] = True
        mask = np.repeat(held, lengths)
    return ~mask, mask


def pack(tokens: np.ndarray, sequence_length: int, what: str) -> np.ndarray:
    """Blocks [n, sequence_length] of `tokens`; `what` names them in the UserError raised where they fill not one."""
    count = len(tokens) // sequence_length
    if not count:
        raise UserError(
            f"{what}: {len(tokens)} tokens do not fill one block of sequence_length={sequence_length}; "
            "give more text or a shorter sequence_length"
        )
    return tokens[: count * sequence_length].reshape(count, sequence_length)


@dataclass
class Packed:
    """Blocks of tokens [n, T] int32 and their marks [n, T] uint8, as models and losses take them.

    separate: whether documents in a block see each other not.
    """

    tokens: np.ndarray
    marks: np.ndarray
    separate: bool

    def __len__(self) -> int:
        return len(self.tokens)

    def row(self, index: int) -> dict[str, np.ndarray]:
        """input_ids and labels [T] int64 of a block, -100 where nothing is learned; position_ids where separated."""
        ids, marks = self.tokens[index].astype(np.int64), self.marks[index]
        labels = np.where(marks & LEARN, ids, -100)
        if not self.separate:
            return {"input_ids": ids, "labels": labels}
        first = (marks & START) > 0
        labels[first] = -100  # no document says how the next one begins
        places = np.arange(len(ids))
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": places - np.maximum.accumulate(np.where(first, places, 0)),
        }

    def rows(self, indices: Iterable[int]) -> dict[str, np.ndarray]:
        """The same of several blocks [B, T]."""
        found = [self.row(index) for index in indices]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}


@dataclass
class Blocks:
    """What a run trains on and measures.

    parts: blocks of each source of `train`, in order; 0 for one that is streamed.   digest: tells whether a resumed run
    sees the same data.   greatest: the greatest token id.
    """

    train: Packed
    held_out: Packed | None
    parts: list[int]
    digest: str
    greatest: int
    directory: Path


def reader_of(data: Data, tokenizer: Any) -> Reader:
    """The reader of records that `data` asks for."""
    skip = data.bad_records == "skip"
    return Reader(data.field, data.split, data.subset, data.chat_field is not None, skip, tokenizer)


def read(sources: list[str], data: Data, tokenizer: Any, report: Report | None = None) -> Corpus:
    """The documents of `sources`, read as `data` says and tokenised. Raises UserError where there is no text."""
    reader = reader_of(data, tokenizer)
    kept = cache.entry(sources, data, tokenizer)
    if kept and (kept / cache.DONE).is_file():
        return Corpus(*(np.load(kept / f"{field.name}.npy", mmap_mode="r") for field in fields(Corpus)))
    corpus = tokenise(documents(sources, reader), tokenizer, report)
    if reader.skipped:
        print(f"{', '.join(sources)}: {reader.skipped} bad records were skipped", file=sys.stderr)
    if not len(corpus.ends):
        raise UserError(f"{', '.join(sources)}: no text in it")
    if kept:
        cache.keep(kept, vars(corpus))
    return corpus


def build(
    data: Data, tokenizer: Any, directory: Path, report: Report | None = None, streamed: Sequence[Packed] = ()
) -> Blocks:
    """Tokenise, split and pack what `data` names, and keep the result under `directory` for `load`.

    streamed: the first blocks of sources that are read while training, for the digest.
    """
    length = data.sequence_length
    tokens: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    held: list[np.ndarray] = []
    held_marks: list[np.ndarray] = []
    packed, packed_marks, parts = [np.zeros((0, length), np.int32)], [np.zeros((0, length), np.uint8)], []
    for sources, later in zip(data.parts(), data.streamed(), strict=True):
        parts.append(0)
        if later:
            continue
        corpus = read(sources, data, tokenizer, report)
        for mask, to, beside in zip(
            split(corpus, data.eval_fraction), (tokens, held), (marks, held_marks), strict=True
        ):
            to.append(corpus.tokens[mask])
            beside.append(corpus.marks[mask])
        packed.append(pack(tokens[-1], length, f"data.train ({', '.join(sources)})"))
        packed_marks.append(pack(marks[-1], length, "marks"))
        parts[-1] = len(packed[-1])
    if data.eval:
        corpus = read(data.eval, data, tokenizer, report)
        held, held_marks = [corpus.tokens], [corpus.marks]
    directory.mkdir(parents=True, exist_ok=True)
    _save(directory / "train.npy", np.concatenate(packed))
    _save(directory / "train_marks.npy", np.concatenate(packed_marks))
    if data.held_out:
        _save(directory / "held_out.npy", pack(np.concatenate(held), length, "the held-out text"))
        _save(directory / "held_out_marks.npy", pack(np.concatenate(held_marks), length, "marks"))
    digest = hashlib.blake2b(digest_size=16)
    for part in (
        *tokens,
        *marks,
        *held,
        *held_marks,
        *(x for blocks in streamed for x in (blocks.tokens, blocks.marks)),
    ):
        digest.update(np.ascontiguousarray(part).data)
    greatest = max(int(x.max()) for x in (*tokens, *held, *(blocks.tokens for blocks in streamed)) if x.size)
    facts = {"digest": digest.hexdigest(), "parts": parts, "separate": data.separate_documents, "greatest": greatest}
    (directory / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    return load(directory)


def load(directory: Path) -> Blocks:
    """What `build` left under `directory`, memory-mapped: the processes of one machine share it."""
    facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))

    def packed(name: str) -> Packed:
        files = (directory / f"{name}{kind}.npy" for kind in ("", "_marks"))
        streaming = not any(facts["parts"]) and name == "train"  # an empty file cannot be mapped
        arrays = (np.load(file, mmap_mode=None if streaming else "r") for file in files)
        return Packed(*arrays, separate=facts["separate"])

    held_out = packed("held_out") if (directory / "held_out.npy").is_file() else None
    return Blocks(packed("train"), held_out, facts["parts"], facts["digest"], facts["greatest"], directory)


def _save(path: Path, array: np.ndarray) -> None:
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    partial.replace(path)


class Order:
    """Which block is the g-th sample of a run: each pass over them has its own order, a function of (seed, pass)."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __getitem__(self, sample: int) -> int:
        epoch, place = divmod(sample, self.count)
        if epoch != self._epoch:
            # Sorting raw generator output: numpy promises its stream for ever, that of `permutation` it does not.
            keys = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(self.count)
            self._epoch, self._order = epoch, np.argsort(keys, kind="stable")
        return int(self._order[place])


class Mixture:
    """Which block is the g-th sample of a run of `count` samples over several sources.

    parts: blocks of each source, which stand one after the other.   phases: (share of the run, weight of each source),
    in order. Each sample's source is drawn by weight, a function of (seed, g); a source's blocks come in its own order,
    each once before any comes twice, over all phases.
    """

    def __init__(self, parts: list[int], phases: list[tuple[float, list[float]]], count: int, seed: int):
        self.first = np.cumsum([0, *parts])
        self.orders = [Order(blocks, seed + i) for i, blocks in enumerate(parts)]
        self.chosen = np.zeros(count, np.int16)
        ends = np.round(np.cumsum([share for share, _ in phases]) * count).astype(int)
        uniform = (
            np.random.Philox(key=np.array([seed, 2**63], np.uint64)).random_raw(count) >> np.uint64(11)
        ) / 2.0**53
        begin = 0
        for end, (_, weights) in zip(ends, phases, strict=True):
            bounds = np.cumsum(weights) / np.sum(weights)
            self.chosen[begin:end] = np.searchsorted(bounds[:-1], uniform[begin:end], side="right")
            begin = end
        self.places = np.zeros(count, np.int64)  # how many samples of the same source came before
        for i in range(len(parts)):
            of_source = self.chosen == i
            self.places[of_source] = np.arange(of_source.sum())

    def where(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and how many samples of that source came before."""
        return int(self.chosen[sample]), int(self.places[sample])

    def taken(self, samples: int) -> list[int]:
        """How many of the first `samples` are of each source."""
        return np.bincount(self.chosen[:samples], minlength=len(self.orders)).tolist()

    def __getitem__(self, sample: int) -> int:
        source, place = self.where(sample)
        return int(self.first[source]) + self.orders[source][place]
