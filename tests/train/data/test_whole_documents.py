"""Whole documents in blocks: best-fit decreasing bins, padding, and losses as of each document alone."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.cli import main
from loopwise.errors import UserError
from loopwise.train.data import LEARN, START, Corpus, Mixture, build, load, pack
from loopwise.train.data.blocks import packed_documents
from loopwise.train.data.packing import PAD, best_fit
from loopwise.train.data.stream import Mark, Stream
from loopwise.train.recipe import Data
from tests.helpers.train_tiny import history, run, same, save_recurrent

EOS = 0


class Tokenizer:
    eos_token_id = EOS


def corpus_of(lengths: list[int]) -> Corpus:
    """Document n (from 1) is n, n, .., EOS; every second token is learned."""
    tokens = np.concatenate([[*[n] * (length - 1), EOS] for n, length in enumerate(lengths, 1)]).astype(np.int32)
    marks = (np.arange(len(tokens)) % 2 * LEARN).astype(np.uint8)
    ends = np.cumsum(lengths)
    marks[np.concatenate([[0], ends[:-1]])] |= START
    return Corpus(tokens, marks, ends, np.arange(len(lengths), dtype=np.uint64))


def documents_of(blocks: Any) -> list[tuple[list[int], list[int]]]:
    """(tokens, marks) of all pieces between STARTs, in all blocks, without padding."""
    found = []
    for ids, marks in zip(blocks.tokens, blocks.marks, strict=True):
        real = marks & PAD == 0
        assert (np.diff(real.astype(int)) <= 0).all(), "padding stands at the end"
        assert (ids[~real] == EOS).all()
        starts = [*np.flatnonzero(marks & START), int(real.sum())]
        assert starts[0] == 0
        found += [(ids[a:b].tolist(), marks[a:b].tolist()) for a, b in itertools.pairwise(starts)]
    return found


def naive(sizes: list[int], room: int) -> list[list[int]]:
    """Best-fit decreasing, by looking at all bins."""
    bins: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        left = [room - sum(sizes[i] for i in bin) for bin in bins]
        fits = [space for space in left if space >= sizes[item]]
        if fits:
            bins[[*left].index(min(fits))].append(item)
        else:
            bins.append([item])
    return bins


@given(st.lists(st.integers(1, 16), max_size=60))
def test_bins_are_best_fit_decreasing(sizes):
    bins = best_fit(sizes, 16)
    assert sorted(item for bin in bins for item in bin) == [*range(len(sizes))]
    rooms = [16 - sum(sizes[i] for i in bin) for bin in bins]
    assert min(rooms, default=0) >= 0
    # Bins with equal room are taken in any order, so that the rooms are compared.
    assert sorted(rooms) == sorted(16 - sum(sizes[i] for i in bin) for bin in naive(sizes, 16))


@given(st.lists(st.integers(2, 40), min_size=1, max_size=40), st.sampled_from(["bfd", "bfd_split"]))
def test_no_document_is_cut_that_fits(lengths, strategy):
    corpus = corpus_of(lengths)
    data = Data(train=["x"], sequence_length=16, packing_strategy=strategy)
    begins = [0, *corpus.ends[:-1]]
    wanted = []
    for begin, end in zip(begins, corpus.ends, strict=True):
        cuts = range(begin, end, 16) if strategy == "bfd_split" else [begin]
        for cut in cuts:
            part = slice(cut, min(cut + 16, end))
            marks = corpus.marks[part].tolist()
            wanted.append((corpus.tokens[part].tolist(), [marks[0] | START, *marks[1:]]))
    blocks = packed_documents(corpus, data, Tokenizer(), "x")  # pyright: ignore[reportArgumentType]
    assert sorted(documents_of(blocks)) == sorted(wanted)
    assert blocks.size == sum(len(ids) for ids, _ in wanted)
    assert [int(blocks.sample(i)["num_tokens"]) for i in range(len(blocks))] == (
        (blocks.marks & PAD == 0).sum(1).tolist()
    )


def test_long_documents_are_cut_skipped_or_refused(capsys, tmp_path, tokenizer):
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in (5, 40, 20, 7)))
    found = {}
    for strategy in ("bfd", "bfd_split"):
        for long in ("cut", "skip"):
            keys = {"packing_strategy": strategy, "long_documents": long}
            data = Data.model_validate({"train": [str(source)], "sequence_length": 16, **keys})
            found[strategy, long] = build(data, tokenizer, tmp_path / f"{strategy}{long}").train
            said = capsys.readouterr().err
            assert f"data.train ({source}): 2 of 4 documents are longer than sequence_length=16 tokens: " in said
            assert said.count("\n") == 1
            kept = "into blocks" if strategy == "bfd_split" else "to their first block"
            assert said.rstrip().endswith("left out" if long == "skip" else f"cut {kept}")
    assert found["bfd", "cut"].size == 6 + 16 + 16 + 8
    assert found["bfd_split", "cut"].size == 6 + 41 + 21 + 8
    assert found["bfd", "skip"].size == found["bfd_split", "skip"].size == 6 + 8
    data = Data(train=[str(source)], sequence_length=16, packing_strategy="bfd", long_documents="stop")
    with pytest.raises(UserError, match=r"texts.jsonl\): document 1 has 41 tokens with EOS, and a block sequence_le"):
        build(data, tokenizer, tmp_path / "refused")
    data = Data(train=[str(source)], sequence_length=5, packing_strategy="bfd", long_documents="skip")
    with pytest.raises(UserError, match=r"no document of at most sequence_length=5 tokens; raise data.sequence_length"):
        build(data, tokenizer, tmp_path / "none")
    keys = ["data.train=x", "steps=1", "data.long_documents=skip"]
    assert main(["train", "model", str(tmp_path / "out"), *keys]) == 2
    assert "data.long_documents=skip has no effect: packing_strategy=wrapped cuts all" in capsys.readouterr().err


def test_held_out_blocks_and_files(corpus, tokenizer, tmp_path):
    """The same documents as under wrapped, in train and held-out blocks, read back from the disk; the same digest."""
    keys = {"train": [str(corpus)], "eval_fraction": 0.2, "sequence_length": 256}
    wrapped = build(Data.model_validate(keys), tokenizer, tmp_path / "wrapped")
    data = Data.model_validate({**keys, "packing_strategy": "bfd", "separate_documents": True})
    built = build(data, tokenizer, tmp_path / "bfd")
    again = load(tmp_path / "bfd")
    assert built.digest == wrapped.digest
    assert again.held_out is not None
    assert again.train.padded
    assert again.held_out.padded
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    found = [tokenizer.decode(ids[:-1]) for blocks in (again.train, again.held_out) for ids, _ in documents_of(blocks)]
    assert sorted(found) == sorted(texts)
    assert again.held_out.size >= 0.2 * (again.train.size + again.held_out.size)
    row = again.held_out.row(0)
    assert "num_tokens" not in row
    real = (again.held_out.marks[0] & PAD) == 0
    assert (row["labels"][~real] == -100).all()
    # The tail of one long text, when that is held out, is a document of its own.
    (tmp_path / "one.txt").write_text("abcdefgh" * 100)
    data = Data(train=[str(tmp_path / "one.txt")], eval_fraction=0.25, sequence_length=64, packing_strategy="bfd_split")
    blocks = build(data, tokenizer, tmp_path / "one")
    assert blocks.held_out is not None
    assert (blocks.train.size, blocks.held_out.size) == (601, 200)
    assert (
        "".join(tokenizer.decode(ids) for ids, _ in documents_of(blocks.train)).replace("<eos>", "")
        == ("abcdefgh" * 100)[:601]
    )


@pytest.mark.parametrize("kind", ["recurrent", "plain"])
def test_losses_are_those_of_each_document_alone(kind, corpus, tokenizer, tmp_path, request):
    import torch

    from loopwise.train.losses import cross_entropy, shifted
    from loopwise.train.pretrained import load_model

    model: Any = load_model(str(request.getfixturevalue(kind))).eval()
    keys = {"num_recurrences": 3} if kind == "recurrent" else {}
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": json.loads(line)["text"][: 5 + 3 * i]}) + "\n"
                for i, line in enumerate(corpus.read_text().splitlines()[:12]))
    )  # fmt: skip
    data = Data(
        train=[str(tmp_path / "texts.jsonl")], sequence_length=48, packing_strategy="bfd", separate_documents=True
    )
    blocks = build(data, tokenizer, tmp_path / "tokens").train
    assert len(blocks) < 12

    def losses(ids: Any, labels: Any, **more: Any) -> Any:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False, **keys, **more).logits
        return cross_entropy(logits, shifted(labels))

    seen = 0
    for i in range(len(blocks)):
        row = {name: torch.from_numpy(value)[None] for name, value in blocks.row(i).items()}
        found = losses(row["input_ids"], row["labels"], position_ids=row["position_ids"])[0]
        real = int((blocks.marks[i] & PAD == 0).sum())
        starts = [*np.flatnonzero(blocks.marks[i] & START).tolist(), real]
        for a, b in itertools.pairwise(starts):
            ids = row["input_ids"][:, a:b]
            alone = losses(ids, ids)[0]
            assert torch.allclose(found[a : b - 1], alone[:-1], atol=2e-5)
            assert found[b - 1] == 0, "the last token predicts nothing: no document, and no padding"
            seen += 1
        assert (found[real:] == 0).all()
    assert seen == 12


def test_a_stream_packs_whole_documents_within_its_window(tokenizer, tmp_path, capsys):
    source = tmp_path / "texts.jsonl"
    texts = [f"<{n}{'x' * (n * 7 % 23)}>" for n in range(30)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "y" * 50]))
    keys = {"train": [str(source)], "streaming": True, "sequence_length": 32, "window": 31, "packing_strategy": "bfd"}
    data = Data.model_validate({**keys, "long_documents": "skip"})
    read = build(data.model_copy(update={"streaming": False}), tokenizer, tmp_path / "tokens").train
    capsys.readouterr()
    stream = Stream([str(source)], data, tokenizer, 0, None)
    first = [stream.row(i) for i in range(len(read))]
    assert sorted(row["input_ids"].tolist() for row in first) == sorted(read.tokens.tolist())
    assert sorted(int(row["num_tokens"]) for row in first) == sorted((read.marks & PAD == 0).sum(1).tolist())
    stream.row(len(read))
    said = capsys.readouterr().err
    assert said == f"{source}, in a window: 1 of 31 documents are longer than sequence_length=32 tokens: left out\n"
    small = data.model_copy(update={"window": 7})
    whole = Stream([str(source)], small, tokenizer, 0, None)
    expected = [whole.row(i)["input_ids"].tolist() for i in range(60)]
    assert (
        len({text for text in texts if any(text in tokenizer.decode([t for t in ids if t]) for ids in expected[:30])})
        == 30
    )
    for place in (0, 5, 17, 41):
        stream = Stream([str(source)], small, tokenizer, 0, None, behind=8)
        for i in range(place + 3):
            stream.row(i)
        mark = Mark(**json.loads(json.dumps(asdict(stream.mark(place)))))
        later = Stream([str(source)], small, tokenizer, 0, mark)
        assert [later.row(i)["input_ids"].tolist() for i in range(place, 60)] == expected[place:]


BFD = ["data.packing_strategy=bfd", "data.separate_documents=true", "data.sequence_length=96", "log_every=2"]


def test_a_run_counts_tokens_without_padding_and_resumes(recurrent, command, corpus, tokenizer, tmp_path, capsys):
    source = tmp_path / "texts.jsonl"
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    source.write_text("".join(json.dumps({"text": text[: 10 + i % 50]}) + "\n" for i, text in enumerate(texts)))
    settings = [*BFD, f"data.train={source}", "steps=8", "save_every=4", "data.eval_fraction=0.1", "recurrence.mean=2"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(command(recurrent, whole, *settings))
    said = capsys.readouterr().out
    data = Data(train=[str(source)], packing_strategy="bfd", sequence_length=96, eval_fraction=0.1)
    blocks = build(data, tokenizer, tmp_path / "tokens").train
    assert f"from the beginning: {blocks.size:,} tokens" in said
    order = Mixture([len(blocks)], [(1.0, [1.0])], 32, 0)
    sizes = (blocks.marks & PAD == 0).sum(1)
    tokens = int(sum(sizes[order[g]] for g in range(32)))
    assert tokens < 32 * 96
    record = json.loads((whole / "run.json").read_text())["spent"]
    assert (record["steps"], record["tokens"]) == (8, tokens)
    (whole / "config.json").rename(tmp_path / "config.json")
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-8")
    run(command(recurrent, resumed, *settings, "--resume"))
    assert "from checkpoint-4" in capsys.readouterr().out
    assert same(whole, resumed)
    assert json.loads((resumed / "run.json").read_text())["spent"] == record
    assert history(whole)[2:] == history(resumed)[2:]
    speeds = history(whole, "tokens_per_second"), history(whole, "flops_per_second")
    assert all(flops / speed > 0 for speed, flops in zip(*speeds, strict=True))


def test_padding_and_routers(tokenizer, tmp_path, capsys):
    router = {"kind": "expert", "capacity": [1.0, 0.5, 0.25], "depths": 3}
    model = save_recurrent(tmp_path / "model", tokenizer, router=router, injection="none", num_recurrences=3)
    assert main(["train", str(model), str(tmp_path / "out"), "data.train=x.txt", "data.packing_strategy=bfd"]) == 2
    assert "data.packing_strategy=bfd: this model's router chooses among all tokens of a block" in (
        capsys.readouterr().err
    )


def test_wrapped_is_as_before(corpus, tokenizer, tmp_path):
    blocks = build(Data(train=[str(corpus)], sequence_length=32), tokenizer, tmp_path / "t").train
    row = [
        t for line in corpus.read_text().splitlines() for t in (*tokenizer(json.loads(line)["text"])["input_ids"], 0)
    ]
    assert np.array_equal(blocks.tokens, pack(np.array(row, np.int32), 32, "x"))
    assert not blocks.padded
    assert blocks.sample(0).keys() == {"input_ids", "labels"}
