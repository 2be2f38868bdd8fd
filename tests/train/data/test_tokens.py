"""Documents to tokens."""

from __future__ import annotations

import numpy as np
import pytest

from loopwise.errors import UserError
from loopwise.train.data import tokenise


def test_tokenise_ends_every_document(tokenizer):
    corpus = tokenise(["ab", "c"], tokenizer)
    a, b, c = (tokenizer.convert_tokens_to_ids(x) for x in "abc")
    assert corpus.tokens.tolist() == [a, b, 0, c, 0]
    assert corpus.ends.tolist() == [3, 5]
    assert corpus.tokens.dtype == np.int32


def test_tokenise_keeps_what_the_tokenizer_puts_first(tokenizer):
    import copy

    from tokenizers.processors import TemplateProcessing

    with_bos = copy.deepcopy(tokenizer)
    with_bos.add_special_tokens({"bos_token": "<s>"})
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", with_bos.bos_token_id)]
    )
    a = tokenizer.convert_tokens_to_ids("a")
    assert tokenise(["a", "aa"], with_bos).tokens.tolist() == [
        *(with_bos.bos_token_id, a, 0),
        *(with_bos.bos_token_id, a, a, 0),
    ]


def test_tokenise_long_documents_in_pieces(tokenizer, monkeypatch):
    from loopwise.train.data import tokens

    texts = ["abcdefg" * 30, "x", "yz" * 9]
    whole = tokenise(texts, tokenizer)
    monkeypatch.setattr(tokens, "PIECE", 16)
    monkeypatch.setattr(tokens, "BATCH", 100)
    pieces = tokenise(texts, tokenizer)
    assert np.array_equal(whole.tokens, pieces.tokens)
    assert np.array_equal(whole.ends, pieces.ends)
    assert np.array_equal(whole.keys, pieces.keys)


def test_tokenise_needs_eos(tokenizer):
    import copy

    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        tokenise(["a"], without)
