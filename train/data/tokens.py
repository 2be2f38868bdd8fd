"""Documents to tokens.

Tokens are int32. One flat array holds all documents, each followed by EOS. A second array of the same length holds
marks, uint8 bit masks: `LEARN` for tokens in the loss, `START` for the first token of a document. In a conversation
the assistant's tokens have `LEARN`; in a text all tokens have it. Five bits hold R of the token's record, 0 for none.
`PAD` marks the padding behind whole documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loopwise.errors import UserError

from ..recipe.fields import DEEPEST
from .reader import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 20  # characters; longer documents are tokenized in pieces, as memory and time grow with the length
BATCH = 1 << 23  # characters passed to the tokenizer at once

LEARN, START, PAD = 1, 2, 128
RECURRENCES = 2  # the lowest bit of a record's R

Report = Callable[[int, int], None]  # (documents, tokens) so far


def recurrences_of(marks: np.ndarray) -> np.ndarray:
    """R of the record of each token, 0 for none."""
    return (marks >> RECURRENCES) & DEEPEST


@dataclass
class Corpus:
    """Tokenized documents.

    tokens [N] int32.   marks [N] uint8.   ends [documents] int64: end of each document in `tokens`.   keys [documents]
    uint64: a hash of each text.
    """

    tokens: np.ndarray
    marks: np.ndarray
    ends: np.ndarray
    keys: np.ndarray

    def kept(self, mask: np.ndarray) -> Corpus:
        """The tokens of `mask` [N], and the documents that have any of them."""
        ends = np.concatenate([[0], np.cumsum(mask)[self.ends - 1]]).astype(np.int64)
        left = np.diff(ends) > 0
        return Corpus(self.tokens[mask], self.marks[mask], ends[1:][left], self.keys[left])


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """The documents of all `corpora` in one."""
    before = np.cumsum([0, *(len(corpus.tokens) for corpus in corpora)])
    return Corpus(
        np.concatenate([corpus.tokens for corpus in corpora]),
        np.concatenate([corpus.marks for corpus in corpora]),
        np.concatenate([corpus.ends + start for corpus, start in zip(corpora, before[:-1], strict=True)]),
        np.concatenate([corpus.keys for corpus in corpora]),
    )


def tokenise(texts: Iterable[Document], tokenizer: PreTrainedTokenizerBase, report: Report | None = None) -> Corpus:
    """Token ids of every document. A text gets the tokenizer's prefix (BOS or nothing) and EOS; a conversation EOS.

    report: called with the running totals after each batch. Raises UserError for a tokenizer without an EOS token.
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
        for document, (text, ids, learned) in zip(batch, _encoded(batch, tokenizer, prefix), strict=True):
            parts.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int32))
            learned[0] |= START
            learned |= getattr(document, "recurrences", 0) << RECURRENCES
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


def _encoded(
    batch: list[Document], tokenizer: PreTrainedTokenizerBase, prefix: list[int]
) -> Iterator[tuple[str, list[int], np.ndarray]]:
    """(text that identifies the document, token ids, marks of these and of the EOS that follows)."""
    texts = [document for document in batch if isinstance(document, str)]
    encoded = iter(_encode(tokenizer, [text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE)]))
    for document in batch:
        if isinstance(document, str):
            pieces = range(0, len(document), PIECE)
            ids = [*prefix, *(part for _ in pieces for part in next(encoded))]
            yield document, ids, np.full(len(ids) + 1, LEARN, np.uint8)
        else:
            mask = [*document.assistant_mask, document.learns_eos]
            yield document.key, document.ids, np.array(mask, np.uint8) * LEARN


def _prefix(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text: [BOS] for some model families."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return next((full[:i] for i in range(len(full)) if full[i : i + len(bare)] == bare), [])


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
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
    if hasattr(backend, "encode_batch_fast"):  # without offsets and masks, which are not used here
        return [encoding.ids for encoding in backend.encode_batch_fast(pieces, add_special_tokens=False)]
    return tokenizer(pieces, add_special_tokens=False)["input_ids"]
