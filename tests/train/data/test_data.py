"""Sources, tokenization, the held-out split, packing and the order of samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.errors import UserError
from loopwise.train.data import LEARN, START, Corpus, Mixture, Order, Packed, build, load, pack, split, tokenise
from loopwise.train.data.documents import documents
from loopwise.train.data.reader import Reader
from loopwise.train.recipe import Data


def read(*sources, field="text", split="train"):
    return list(documents([str(source) for source in sources], Reader(field, split)))


def test_sources(tmp_path):
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.py").write_text("second")
    (tmp_path / "deep" / "c.jsonl").write_text('{"text": "third"}\n\n{"text": ""}\n{"text": "fourth"}\n')
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00\xff")
    (tmp_path / ".hidden").write_text("never")
    (tmp_path / "empty.txt").write_text("")
    assert read(tmp_path) == ["first\n", "second", "third", "fourth"]
    assert read(f"{tmp_path}/**/*.py", tmp_path / "a.txt") == ["second", "first\n"]
    (tmp_path / "other.jsonl").write_text('{"body": "x"}')
    assert read(tmp_path / "other.jsonl", field="body") == ["x"]
    (tmp_path / "marked.jsonl").write_text('{"text": "x"}', encoding="utf-8-sig")
    (tmp_path / "marked.txt").write_text("y", encoding="utf-8-sig")
    assert read(tmp_path / "marked.jsonl", tmp_path / "marked.txt") == ["x", "y"]
    (tmp_path / "array.json").write_text('[{"text": "one"},\n {"text": "two"}]')
    (tmp_path / "lines.json").write_text('{"text": "three"}\n{"text": "four"}')
    assert read(tmp_path / "array.json", tmp_path / "lines.json") == ["one", "two", "three", "four"]


def test_datasets_sources(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "splits")
    dataset.to_parquet(tmp_path / "table.parquet")
    assert read(tmp_path / "saved") == read(tmp_path / "splits") == read(tmp_path / "table.parquet") == ["one", "two"]
    assert read(tmp_path / "splits", split="test") == ["two"]
    with pytest.raises(UserError, match="no split 'dev'; it has 'train', 'test'"):
        read(tmp_path / "splits", split="dev")
    with pytest.raises(UserError, match=r"saved row 0: field 'n' holds a int, not text"):
        read(tmp_path / "saved", field="n")
    with pytest.raises(UserError, match="no field 'body' among 'text', 'n'"):
        read(tmp_path / "table.parquet", field="body")


def test_a_table_without_rows_ends_nothing(tmp_path):
    """The last part of a dataset may be empty; it is read whole and as a stream."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    from loopwise.train.data.stream import stream_of

    schema = pyarrow.schema([("text", pyarrow.string())])
    for name, texts in (("a", []), ("b", ["one", "two"]), ("c", [])):
        parquet.write_table(pyarrow.table({"text": texts}, schema), tmp_path / f"{name}.parquet")
    assert read(tmp_path) == ["one", "two"]
    assert [row["text"] for row in stream_of(str(tmp_path), Reader())] == ["one", "two"]
    assert read(tmp_path / "a.parquet") == []
    with pytest.raises(UserError, match=r"a\.parquet: no text in it"):
        stream_of(str(tmp_path / "a.parquet"), Reader())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"bad\.jsonl:2: not JSON"),
        ('{"text": "a"}\n["a"]\n', r"bad\.jsonl:2: a record is an object with a field 'text', not a list"),
        ('{"text": "a"}\n\n{"txt": "a", "id": 1}\n', r"bad\.jsonl:3: no field 'text' among 'txt', 'id'"),
        ('{"text": 5}\n', r"bad\.jsonl:1: field 'text' holds a int, not text"),
        ('{"text": "a"}\n{"text": "b\\ud800"}\n', r"bad\.jsonl:2: field 'text' is not text: half a surrogate at 1"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, message):
    (tmp_path / "bad.jsonl").write_text(lines)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "bad.jsonl")


def test_bad_files_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8 text"):
        read(tmp_path / "latin.txt")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "ok"}\n' + '{"text": "schön"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl:\d: not UTF-8"):
        read(tmp_path / "latin.jsonl")
    for missing in (tmp_path / "nowhere", "./nowhere", "nowhere.txt"):
        with pytest.raises(UserError, match="no such file or directory"):
            read(missing)
    with pytest.raises(UserError, match="no files there"):
        read(tmp_path / "*.rst")


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


@given(st.integers(1, 40), st.integers(0, 1000), st.integers(0, 5))
def test_order_passes_over_every_block(count, seed, epoch):
    order = Order(count, seed)
    seen = [order[epoch * count + i] for i in range(count)]
    assert sorted(seen) == list(range(count))
    assert [Order(count, seed)[epoch * count + i] for i in reversed(range(count))] == seen[::-1]


def test_order_shuffles_every_pass_anew():
    order = Order(50, 3)
    first, second = ([order[e * 50 + i] for i in range(50)] for e in (0, 1))
    assert first != second
    assert first != list(range(50))
    assert [Order(5, 0)[i] for i in range(10)] == [0, 2, 1, 4, 3, 3, 2, 4, 1, 0]  # a resumed run must find the same


CHAT = [
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "because"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "so"},
]
TEMPLATES = {
    "plain": "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "marked": "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}|{% endgeneration %}{% else %}{{ m['content'] }}|{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_are_learned_where_the_assistant_speaks(template, tokenizer, tmp_path):
    import copy
    import json

    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = TEMPLATES[template]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n")
    data = Data(train=[str(file)], chat_field="messages", sequence_length=8)
    text = "[user]why|[assistant]because|[user]and|[assistant]so|"
    blocks = build(data, chatting, tmp_path / "tokens").train
    row = blocks.rows(range(len(blocks)))
    ids, labels = row["input_ids"].ravel(), row["labels"].ravel()
    whole = [*chatting(text, add_special_tokens=False)["input_ids"], 0][: len(ids)]
    assert ids.tolist() == whole
    said = [chatting.decode([i]) for i in labels if i != -100]
    assert "".join(said) == "because|so|"[: len(said)]
    assert len(said) >= 8


def test_bad_chats(tokenizer, tmp_path):
    for value, message in {
        '"x"': "a conversation is a list of messages, not str",
        '[{"role": "user"}]': "message 0 lacks text in 'role' or 'content'",
        '[{"role": "user", "content": "x"}]': "no message of the assistant",
    }.items():
        (tmp_path / "chat.jsonl").write_text('{"m": ' + value + "}\n")
        with pytest.raises(UserError, match=f"chat.jsonl:1: field 'm': {message}"):
            list(documents([str(tmp_path / "chat.jsonl")], Reader("m", chat=True)))


def test_bad_records_are_skipped_and_named(tmp_path, capsys):
    lines = ['{"text": "a"}', '{"text": ', "\xff", '{"txt": 1}', '{"text": "b"}', *['{"text": 1}'] * 12]
    (tmp_path / "bad.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    reader = Reader(skip=True)
    assert list(documents([str(tmp_path / "bad.jsonl")], reader)) == ["a", "b"]
    error = capsys.readouterr().err.splitlines()
    assert reader.skipped == 15
    assert len(error) == 10
    assert "bad.jsonl:2: not JSON" in error[0]
    assert "bad.jsonl:3: not UTF-8" in error[1]
    assert "bad.jsonl:4: no field 'text' among 'txt'" in error[2]
    assert error[-1].endswith("the next ones are not named")


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


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 50), st.integers(1, 400), st.data())
def test_a_mixture_takes_every_block_of_a_source_in_turn(parts, seed, count, data):
    weights = [data.draw(st.floats(0.1, 5)) for _ in parts]
    mixture = Mixture(parts, [(0.5, weights), (0.5, weights[::-1])], count, seed)
    rows = [mixture[g] for g in range(count)]
    assert rows == [Mixture(parts, [(0.5, weights), (0.5, weights[::-1])], count, seed)[g] for g in range(count)]
    begin = 0
    for size in parts:
        own = [row for row in rows if begin <= row < begin + size]
        for epoch in range(0, len(own), size):
            assert len(set(own[epoch : epoch + size])) == len(own[epoch : epoch + size])
        begin += size
    assert begin > max(rows)


def test_phases_follow_their_weights():
    mixture = Mixture([100, 100, 100], [(0.25, [1, 0, 0]), (0.75, [0, 3, 1])], 8000, 0)
    source = [mixture[g] // 100 for g in range(8000)]
    assert set(source[:2000]) == {0}
    assert set(source[2000:]) == {1, 2}
    assert source[2000:].count(1) / 6000 == pytest.approx(0.75, abs=0.02)


def test_one_source_is_as_before():
    assert [Mixture([7], [(1.0, [1.0])], 20, 3)[g] for g in range(20)] == [Order(7, 3)[g] for g in range(20)]


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
