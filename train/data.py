"""Text to packed blocks of tokens: tokenise, split off the held-out part, pack.

Tokens are int32. One flat array holds all documents, each ended by EOS; blocks are cut out of it without regard to
document ends, and what does not fill a last block is dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loopwise.errors import UserError

from .recipe import Data
from .sources import documents

PIECE = 1 << 20  # characters; a longer document is tokenised in pieces, as memory and time grow with the text
BATCH = 1 << 23  # characters handed to the tokenizer at once

Report = Callable[[int, int], None]  # (documents, tokens) so far


@dataclass
class Corpus:
    """Tokenised documents. tokens [N] int32; ends [documents] int64; keys [documents] uint64, a hash of each text."""

    tokens: np.ndarray
    ends: np.ndarray
    keys: np.ndarray


def tokenise(texts: Iterable[str], tokenizer: Any, report: Report | None = None) -> Corpus:
    """Token ids of every document: what the tokenizer puts before a text (BOS or nothing), the text, EOS.

    Raises UserError where the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, which separates packed documents; set its eos_token")
    prefix = _prefix(tokenizer)
    parts: list[np.ndarray] = []
    ends: list[int] = []
    keys: list[int] = []
    total = 0
    for batch in _batches(texts):
        pieces = [text[i : i + PIECE] for text in batch for i in range(0, len(text), PIECE)]
        encoded = iter(_encode(tokenizer, pieces))
        for text in batch:
            ids = [part for _ in range(0, len(text), PIECE) for part in next(encoded)]
            parts.append(np.array([*prefix, *ids, tokenizer.eos_token_id], dtype=np.int32))
            total += len(parts[-1])
            ends.append(total)
            keys.append(int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()))
        if report:
            report(len(ends), total)
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    return Corpus(tokens, np.array(ends, np.int64), np.array(keys, np.uint64))


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: [BOS] for some model families."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return next((full[:i] for i in range(len(full)) if full[i : i + len(bare)] == bare), [])


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
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
    """(training, held-out) tokens. Documents are held out in the order of their keys until they make up `fraction`.

    So the choice depends on the texts alone. Where that would be over twice the `fraction` (few, long documents), the
    last `fraction` of all tokens is held out instead.
    """
    total = len(corpus.tokens)
    wanted = fraction * total
    if wanted < 1:
        return corpus.tokens, corpus.tokens[:0]
    lengths = np.diff(corpus.ends, prepend=0)
    order = np.argsort(corpus.keys, kind="stable")
    reached = np.cumsum(lengths[order])
    count = int(np.searchsorted(reached, wanted)) + 1
    if reached[min(count, len(reached)) - 1] > 2 * wanted:
        cut = total - int(wanted)
        return corpus.tokens[:cut], corpus.tokens[cut:]
    held = np.zeros(len(lengths), bool)
    held[order[:count]] = True
    mask = np.repeat(held, lengths)
    return corpus.tokens[~mask], corpus.tokens[mask]


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
class Blocks:
    """Packed blocks [n, T] int32, and a digest of both that tells whether a resumed run sees the same data."""

    train: np.ndarray
    held_out: np.ndarray | None
    digest: str
    directory: Path

    def inputs(self, rows: slice) -> dict[str, Any]:
        """What a model is called with for these training blocks."""
        import torch

        count = len(range(*rows.indices(len(self.train))))
        return {
            "input_ids": torch.from_numpy(self.train[rows].astype(np.int64)),
            "sequence_ids": torch.zeros(count, dtype=torch.int64),
        }


def read(sources: list[str], data: Data, tokenizer: Any, report: Report | None = None) -> Corpus:
    """The documents of `sources`, read as `data` says and tokenised. Raises UserError where there is no text."""
    corpus = tokenise(documents(sources, data.text_field, data.split, data.subset), tokenizer, report)
    if not len(corpus.ends):
        raise UserError(f"{', '.join(sources)}: no text in it")
    return corpus


def build(data: Data, tokenizer: Any, directory: Path, report: Report | None = None) -> Blocks:
    """Tokenise, split and pack what `data` names, and keep the result under `directory` for `load`."""
    train, held = split(read(data.train, data, tokenizer, report), data.eval_fraction)
    if data.eval:
        held = read(data.eval, data, tokenizer, report).tokens
    directory.mkdir(parents=True, exist_ok=True)
    _save(directory / "train.npy", pack(train, data.sequence_length, "data.train"))
    if data.held_out:
        _save(directory / "held_out.npy", pack(held, data.sequence_length, "the held-out text"))
    digest = hashlib.blake2b(digest_size=16)
    for tokens in (train, held):
        digest.update(np.ascontiguousarray(tokens).data)
    (directory / "digest").write_text(digest.hexdigest())
    return load(directory)


def load(directory: Path) -> Blocks:
    """What `build` left under `directory`, memory-mapped: the processes of one machine share it."""
    train = np.load(directory / "train.npy", mmap_mode="r")
    held = directory / "held_out.npy"
    held_out = np.load(held, mmap_mode="r") if held.is_file() else None
    return Blocks(train, held_out, (directory / "digest").read_text(), directory)


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
