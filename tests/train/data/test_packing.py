"""The held-out split, packing, and the separation of packed documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.errors import UserError
from loopwise.train.data import LEARN, START, Corpus, Packed, pack, split
from loopwise.train.data.tokens import RECURRENCES


def test_pack_values():
    blocks = pack(np.arange(11, dtype=np.int32), 4, "data.train")
    assert blocks.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(UserError, match=r"data\.train: 3 tokens do not fill one block of sequence_length=4"):
        pack(np.arange(3, dtype=np.int32), 4, "data.train")


def corpus_of(lengths, keys=None):
    ends = np.cumsum(lengths)
    tokens = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)  # a token is its document's number
    keys = np.arange(len(lengths)) if keys is None else keys
    return Corpus(tokens, np.full(len(tokens), LEARN, np.uint8), ends, np.array(keys, np.uint64))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.floats(0.001, 0.499), st.integers(0, 99))
def test_split_is_a_partition_of_about_the_fraction(lengths, fraction, seed):
    corpus = corpus_of(lengths, np.random.default_rng(seed).integers(0, 2**63, len(lengths)))
    train, held = (corpus.tokens[mask] for mask in split(corpus, fraction))
    assert sorted([*train, *held]) == corpus.tokens.tolist()
    wanted = fraction * len(corpus.tokens)
    assert int(wanted) <= len(held) <= 2 * wanted
    shared = set(train.tolist()) & set(held.tolist())
    assert len(shared) <= 1  # by document, but for the one that the tail cuts


def test_split_depends_on_the_documents_alone():
    keys = np.random.default_rng(0).integers(0, 2**63, 100)
    lengths = np.random.default_rng(1).integers(5, 20, 100)
    held = corpus_of(lengths).tokens[split(corpus_of(lengths, keys), 0.1)[1]]
    order = np.random.default_rng(2).permutation(100)
    shuffled = corpus_of(lengths[order]).tokens[split(corpus_of(lengths[order], keys[order]), 0.1)[1]]
    assert set(held.tolist()) == {int(order[i]) for i in shuffled}


def test_separate_documents_restart_positions_and_predict_no_beginning():
    marks = np.full((1, 8), LEARN, np.uint8)
    marks[0, [2, 5]] |= START
    row = Packed(np.arange(10, 18, dtype=np.int32)[None], marks, separate=True).row(0)
    assert row["position_ids"].tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert row["labels"].tolist() == [10, 11, -100, 13, 14, -100, 16, 17]
    assert "position_ids" not in Packed(np.arange(8, dtype=np.int32)[None], marks, separate=False).row(0)


def test_separate_documents_do_not_see_each_other(recurrent):
    import torch

    from loopwise.train.pretrained import load_model

    marks = np.full((1, 12), LEARN, np.uint8)
    marks[0, 5] |= START
    tokens = np.random.default_rng(0).integers(1, 270, (1, 12)).astype(np.int32)
    row = Packed(tokens, marks, separate=True).rows([0])
    model = load_model(str(recurrent)).eval()
    inputs = {name: torch.from_numpy(row[name]) for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        together = model(**inputs, num_recurrences=3, use_cache=False).logits
        alone = [
            model(inputs["input_ids"][:, a:b], num_recurrences=3, use_cache=False).logits for a, b in ((0, 5), (5, 12))
        ]
        joined = model(inputs["input_ids"], num_recurrences=3, use_cache=False).logits
    assert torch.allclose(together, torch.cat(alone, 1), atol=1e-5)
    assert not torch.allclose(joined[:, 5:], together[:, 5:], atol=1e-3)


def test_a_block_has_the_greatest_recurrences_of_its_records():
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    of_records = np.array([[3, 3, 5, 5, 5, 0], [0, 0, 0, 0, 31, 31]])
    marks = (of_records << RECURRENCES | np.array([START | LEARN, LEARN, START, 0, LEARN, START])).astype(np.uint8)
    rows = Packed(tokens, marks, separate=False, by_record=True).rows([0, 1])
    assert rows["num_recurrences"].tolist() == [5, 31]
    assert rows["labels"].tolist() == [[0, 1, -100, -100, 4, -100], [6, 7, -100, -100, 10, -100]]
    assert "num_recurrences" not in Packed(tokens, marks, separate=False).row(0)
