"""The packed data of a run, and the cache of tokens."""

from __future__ import annotations

import numpy as np
import pytest

from loopwise.errors import UserError
from loopwise.train.data import build, load
from loopwise.train.recipe import Data


def test_build_and_load(tmp_path, corpus, tokenizer):
    data = Data(train=[str(corpus)], eval_fraction=0.1, sequence_length=16)
    built = build(data, tokenizer, tmp_path / "tokens")
    again = load(tmp_path / "tokens")
    assert np.array_equal(built.train.tokens, again.train.tokens)
    assert again.held_out is not None
    assert built.train.tokens.shape[1] == again.held_out.tokens.shape[1] == 16
    assert build(data, tokenizer, tmp_path / "other").digest == again.digest
    changed = build(data.model_copy(update={"eval_fraction": 0.2}), tokenizer, tmp_path / "third")
    assert changed.digest != again.digest


def test_no_text(tmp_path, tokenizer):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"empty\.txt: no text in it"):
        build(Data(train=[str(tmp_path / "empty.txt")]), tokenizer, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_phases_of_a_recipe(tmp_path, corpus, tokenizer):
    other = tmp_path / "other.txt"
    other.write_text("zzzz " * 200)
    phases = [{"share": 0.5, "sources": {str(corpus): 1}}, {"share": 0.5, "sources": {str(other): 2, str(corpus): 1}}]
    data = Data.model_validate({"phases": phases, "sequence_length": 16})
    blocks = build(data, tokenizer, tmp_path / "tokens")
    assert len(blocks.parts) == 2
    assert sum(blocks.parts) == len(blocks.train)
    assert data.mixture() == [(0.5, [1.0, 0.0]), (0.5, [1.0, 2.0])]
    z = tokenizer.convert_tokens_to_ids("z")
    assert (blocks.train.tokens[blocks.parts[0] :] == z).mean() > 0.7
    for wrong, message in (
        ({"phases": phases[:1]}, "sum to 0.5"),
        ({"phases": phases, "train": ["x"]}, "give one"),
        ({}, "train and phases both name the text"),
    ):
        with pytest.raises(ValueError, match=message):
            Data.model_validate(wrong)


def test_tokens_are_kept_for_later_runs(tmp_path, corpus, tokenizer, monkeypatch):
    import shutil

    from loopwise.train.data import blocks as module

    copied = shutil.copy(corpus, tmp_path / "copied.jsonl")
    data = Data(train=[str(copied)], sequence_length=16, cache=str(tmp_path / "cache"))
    first = build(data, tokenizer, tmp_path / "one").digest
    calls = []
    whole = module.tokenise
    monkeypatch.setattr(module, "tokenise", lambda *a, **k: calls.append(1) or whole(*a, **k))
    assert build(data, tokenizer, tmp_path / "two").digest == first
    assert not calls
    with copied.open("a") as file:
        file.write('{"text": "more and more of it"}\n')
    assert build(data, tokenizer, tmp_path / "three").digest != first
    assert calls == [1]
    for entry in (tmp_path / "cache").iterdir():  # as a killed run leaves it: not taken
        (entry / "done").unlink()
    build(data, tokenizer, tmp_path / "four")
    assert calls == [1, 1]
