"""Sources that are read during training."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from loopwise.cli import main
from loopwise.errors import UserError
from loopwise.train.data.documents import documents
from loopwise.train.data.reader import Reader
from loopwise.train.data.stream import Mark, Stream, open_all, save_marks
from loopwise.train.recipe import Data
from tests.helpers.train_tiny import RECURRENCE, run, same

LENGTH, WINDOW = 16, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files of ten distinct documents each."""
    path = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        lines = (json.dumps({"text": f"<{shard} {i} {'x' * (i % 5)}>"}) + "\n" for i in range(10))
        (path / f"{shard}.jsonl").write_text("".join(lines))
    return path


def opened(source, tokenizer, mark=None, **keys) -> Stream:
    data = Data.model_validate(
        {"train": [str(source)], "streaming": True, "sequence_length": LENGTH, "window": WINDOW, **keys}
    )
    return Stream([str(source)], data, tokenizer, 0, mark, behind=8)


def blocks(stream: Stream, count: int) -> list[list[int]]:
    return [stream.row(i)["input_ids"].tolist() for i in range(count)]


def test_every_document_once_a_pass_from_any_kind_of_source(folder, tokenizer, tmp_path):
    import datasets

    rows = [json.loads(line) for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(tmp_path / "saved")
    whole.to_parquet(tmp_path / "table.parquet")
    (tmp_path / "texts").mkdir()
    for i, row in enumerate(rows):
        (tmp_path / "texts" / f"{i:02d}.txt").write_text(row["text"])
    expected = [t for row in rows for t in (*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id)]
    count = len(expected) // LENGTH
    # One window over the whole pass: its blocks are those of the text, in another order.
    once = blocks(opened(folder, tokenizer, window=30), count)
    cut = np.array(expected[: count * LENGTH]).reshape(count, LENGTH).tolist()
    assert once != cut
    assert sorted(once) == sorted(cut)
    for source in (folder, tmp_path / "saved", tmp_path / "table.parquet", tmp_path / "texts"):
        found = blocks(opened(source, tokenizer), 3 * count)
        assert found == blocks(opened(folder, tokenizer), 3 * count)
        # Windows and passes lose and repeat nothing.
        tokens = sorted(t for block in found for t in block)
        shifted = abs(np.bincount(tokens, minlength=272) - 3 * np.bincount(expected, minlength=272))
        assert shifted.sum() < 3 * LENGTH * WINDOW


def test_windows_of_long_documents_alone_are_passed_over(tokenizer, tmp_path):
    texts = ["x" * 100, "y" * 90, "short", "z" * 80]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    keys = {"window": 1, "packing_strategy": "bfd", "long_documents": "skip", "separate_documents": True}
    (first, second) = blocks(opened(tmp_path / "long.jsonl", tokenizer, **keys), 2)
    assert first == second
    assert tokenizer.decode(first[:-1]).startswith("short")
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:2]))
    with pytest.raises(UserError, match="no document of at most sequence_length=16 tokens"):
        opened(tmp_path / "long.jsonl", tokenizer, **keys).row(0)
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "ab"}) + "\n")  # wrapped blocks go on over windows
    assert len(opened(tmp_path / "short.jsonl", tokenizer, window=2).row(3)["input_ids"]) == LENGTH


def test_a_stream_of_other_sources_begins_anew(folder, tokenizer, tmp_path):
    """Marks are of the sources that they were written for."""
    files = [str(file) for file in sorted(folder.iterdir())]
    keys = {"streaming": True, "sequence_length": LENGTH, "window": WINDOW}

    def streams(names: list[str], checkpoint: Path | None) -> dict[int, Stream]:
        return open_all(Data.model_validate({"train": names, **keys}), tokenizer, 0, checkpoint, 8)

    three = streams(files, None)
    blocks(three[0], 25)  # in the second file, or behind it
    save_marks(three, [25], tmp_path)
    assert streams(files, tmp_path)[0].marks[0].source > 0
    one = streams(files[:1], tmp_path)[0]
    assert one.marks[0].source == 0
    assert blocks(one, 3) == blocks(streams(files[:1], None)[0], 3)


def test_a_mark_says_where_to_go_on(folder, tokenizer):
    expected = blocks(opened(folder, tokenizer), 80)
    for place in (0, 1, 13, 29, 40, 79):
        first = opened(folder, tokenizer)
        for i in range(min(place + 8, 80)):  # read ahead, as loaders do
            first.row(i)
        mark = json.loads(json.dumps(asdict(first.mark(place))))
        assert mark["first"] > place - 30
        second = opened(folder, tokenizer, Mark(**mark))
        assert [second.row(i)["input_ids"].tolist() for i in range(place, 80)] == expected[place:]
    ranks = [opened(folder, tokenizer) for _ in range(2)]
    assert [ranks[i % 2].row(i)["input_ids"].tolist() for i in range(80)] == expected
    assert ranks[0].row(2)["input_ids"].tolist() == expected[2]  # going back reads anew


def test_bad_lines_are_named_and_skipped_or_end_the_run(folder, tokenizer, tmp_path, capsys):
    """Also by a stream that continues from a mark in the middle of a file."""
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    lines = (broken / "1.jsonl").read_bytes().splitlines(keepends=True)
    bad = [b'{"text": "a\n', b'{"text": "\xe9"}\n', b'{"text": "\\ud800"}\n', b'{"text": null}\n', b"[]\n"]
    (broken / "1.jsonl").write_bytes(b"".join([*lines[:5], *bad, *lines[5:]]))
    expected = blocks(opened(folder, tokenizer), 60)
    stream = opened(broken, tokenizer, bad_records="skip")
    assert blocks(stream, 60) == expected
    named = capsys.readouterr().err
    assert f"skipped {broken / '1.jsonl'}:6: not JSON" in named
    assert f"skipped {broken / '1.jsonl'}:7: not UTF-8" in named
    for place in (13, 22, 31):
        first = opened(broken, tokenizer, bad_records="skip")
        first.row(place)
        later = opened(broken, tokenizer, Mark(**asdict(first.mark(place))), bad_records="skip")
        assert [later.row(i)["input_ids"].tolist() for i in range(place, 60)] == expected[place:]
    with pytest.raises(UserError, match=r"1\.jsonl:6: not JSON"):
        blocks(opened(broken, tokenizer), 60)


BAD = {
    "latin.txt": ("schön\n".encode("latin-1"), [], ["latin.txt: not UTF-8 text"]),
    "marked.txt": (b"\xef\xbb\xbfone\r\ntwo", ["one\ntwo"], []),
    "ragged.csv": (
        b'text,n\none,1\ntwo,2,3\n\n"three\nlines",3\nshort\n"quo"ted,4\nNA,4\n"open',
        ["one", "three\nlines", "short", "NA"],
        ["ragged.csv:3: 3 cells, and the header has 2", "ragged.csv:8: no row", "ragged.csv:10: no row"],
    ),
    "latin.csv": ("n,text\n1,one\n2,schön\n3,two\n".encode("latin-1"), ["one", "two"], ["latin.csv:3: not UTF-8"]),
    "few.csv": (b"n,text\n1\n2,two\n", ["two"], ["few.csv:2: no field 'text' among 'n'; text_field names"]),
    "tabs.tsv": (b"n\ttext\n1\tone, two\n2\t007\n3\tNA\t\n", ["one, two", "007"], ["tabs.tsv:4: 3 cells"]),
    "packed.tsv.gz": (gzip.compress(b"text\tn\none\t1\n"), ["one"], []),
    "long.csv": (b"text\n" + b"x" * 200_000 + b"\n", ["x" * 200_000], []),
    "array.json": (b'[{"text": "one"}, {"text": 5}, {"text": "two"}]', ["one", "two"], ["array.json record 1: field"]),
    "latin.json": ('[{"text": "schön"}]'.encode("latin-1"), [], ["latin.json: not UTF-8 text"]),
    "cut.json": (b'[{"text": "one"}, {"te', [], ["cut.json: not JSON"]),
    "lines.jsonl": (b'{"text": "one"}\n{"te\n{"text": "two"}\n', ["one", "two"], ["lines.jsonl:2: not JSON"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_stream_reads_what_is_read_before_training(name, tokenizer, tmp_path, capsys):
    """The same documents, and the same messages for bad ones, skipped or ending the run."""
    content, expected, told = BAD[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "more.jsonl").write_text('{"text": "more"}\n')
    sources = [str(tmp_path / name), str(tmp_path / "more.jsonl")]
    assert list(documents(sources, Reader(skip=True))) == [*expected, "more"]
    named = capsys.readouterr().err.splitlines()
    assert len(named) == len(told)
    assert all(part in line for part, line in zip(told, named, strict=True))
    data = Data.model_validate(
        {"train": sources, "streaming": True, "window": len(expected) + 1, "bad_records": "skip"}
    )
    stream = Stream(sources, data, tokenizer, 0, None)
    assert [*stream._documents()] == [*expected, "more"]
    assert capsys.readouterr().err.splitlines() == named
    if told:
        for read in (
            lambda: list(documents(sources, Reader())),
            lambda: list(
                Stream(sources, data.model_copy(update={"bad_records": "stop"}), tokenizer, 0, None)._documents()
            ),
        ):
            with pytest.raises(UserError, match=re.escape(told[0])):
                read()


def test_a_stream_of_a_folder_reads_what_its_files_hold(tokenizer, tmp_path):
    """Files of several kinds, like a folder that is read before training; a mark in a table is a position."""
    (tmp_path / "a.csv").write_text("text,n\n" + "".join(f'"row\n{i}",{i}\n' for i in range(12)))
    (tmp_path / "b.json").write_text(json.dumps([{"text": f"entry {i}"} for i in range(12)]))
    (tmp_path / "c.txt").write_text("text")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe no text")
    expected = list(documents([str(tmp_path)], Reader()))
    assert len(expected) == 25
    assert [*opened(tmp_path, tokenizer, window=25)._documents()] == expected
    found = blocks(opened(tmp_path, tokenizer), 60)
    for place in (3, 14, 29, 41):
        first = opened(tmp_path, tokenizer)
        first.row(place)
        mark = json.loads(json.dumps(asdict(first.mark(place))))
        second = opened(tmp_path, tokenizer, Mark(**mark))
        assert [second.row(i)["input_ids"].tolist() for i in range(place, 60)] == found[place:]


@pytest.fixture(scope="module")
def mixed(folder, corpus):
    phases = [
        {"share": 0.4, "sources": {str(folder): 1, str(corpus): 1}},
        {"share": 0.6, "sources": {str(folder): 3, str(corpus): 1}},
    ]
    data = ["data.phases=" + json.dumps(phases), f"data.streaming={folder}", f"data.window={WINDOW}"]
    return [*data, "data.sequence_length=32", "batch_size=3", f"data.eval={corpus}", "save_every=5", *RECURRENCE]


def test_resumed_run_ends_the_same(noisy, mixed, tmp_path, capsys):
    arguments = ["train", str(noisy), str(tmp_path / "whole"), *mixed, "steps=15", "keep_checkpoints=3"]
    run(arguments)
    assert "and 1 streamed" in capsys.readouterr().out
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("config.json", "model.safetensors", "trainer_state.json", "run.json"):
        (cut / name).unlink()
    shutil.rmtree(cut / "checkpoint-15")
    shutil.rmtree(cut / "checkpoint-10")
    arguments[2] = str(cut)
    run([*arguments, "--resume"])
    assert "from checkpoint-5" in capsys.readouterr().out
    assert same(tmp_path / "whole", cut)
    marks = [json.loads((out / "checkpoint-15" / "streams.json").read_text()) for out in (cut, tmp_path / "whole")]
    assert marks[0] == marks[1]
    assert marks[0]["0"]["first"] > 0


@pytest.mark.parametrize("change", ["within the window", "before it", "an earlier file"])
def test_a_text_that_changed_under_a_resume_is_refused(change, folder, tokenizer, tmp_path, capsys):
    """By a digest in the mark: what follows would not be what the run was to read. Later files may change."""
    source = shutil.copytree(folder, tmp_path / "source")
    expected = blocks(opened(source, tokenizer), 60)
    first = opened(source, tokenizer)
    first.row(9)
    mark = json.loads(json.dumps(asdict(first.mark(9))))
    assert mark["state"]["file"] == 1
    with (source / "2.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    second = opened(source, tokenizer, Mark(**mark))
    assert second.row(9)["input_ids"].tolist() == expected[9]
    lines = (folder / "1.jsonl").read_text().splitlines(keepends=True)
    if change == "within the window":
        lines[mark["state"]["line"]] = '{"text": "another"}\n'
    elif change == "before it":
        lines.insert(0, '{"text": "another"}\n')
    else:
        (source / "0.jsonl").write_text('{"text": "another"}\n' + (source / "0.jsonl").read_text())
    (source / "1.jsonl").write_text("".join(lines))
    message = f"{source}: the text has changed since the checkpoint was written"
    with pytest.raises(UserError, match=re.escape(message)):
        opened(source, tokenizer, Mark(**mark)).row(9)
    data = first.data
    Stream([str(source)], data, tokenizer, 0, Mark(**mark), accept=True).row(9)
    assert capsys.readouterr().err == f"{message}; continuing with the new one\n"
    opened(source, tokenizer, Mark(**{**mark, "read": None})).row(9)  # a checkpoint of an earlier release


def test_a_stream_that_changed_is_refused_by_train(noisy, tmp_path, capsys):
    source, out = tmp_path / "text.jsonl", tmp_path / "out"
    good = [json.dumps({"text": f"document {i} of them all"}) for i in range(64)]
    source.write_text("\n".join(good))
    command = ["train", str(noisy), str(out), f"data.train={source}", "data.sequence_length=32", "data.streaming=true"]
    command += ["data.window=8", "batch_size=4", "steps=4", "save_every=2"]
    run(command)
    for name in ("checkpoint-4", "tokens"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "config.json").unlink()
    source.write_text("\n".join(["", *reversed(good)]))
    for kept in (True, False):  # the first blocks, or only the place of the checkpoint
        if not kept:
            source.write_text("\n".join([*good[:8], *reversed(good[8:])]))
        assert main([*command, "--resume"]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert ("digest of the data was" if kept else f"{source}: the text has changed since") in error
    run([*command, "--resume", "--accept-changes"])
    assert "continuing with the new one" in capsys.readouterr().err


def test_a_stream_that_cannot_be_read_on_loses_no_step(noisy, tmp_path, capsys):
    """The steps done are in a checkpoint, and --resume continues as if the source had never been bad."""
    source, settings = tmp_path / "text.jsonl", ["data.streaming=true", "data.window=8", "batch_size=4", "steps=8"]
    good = [json.dumps({"text": f"document {i} of them all"}) for i in range(64)]
    source.write_text("\n".join(good))

    def arguments(out: str) -> list[str]:
        return ["train", str(noisy), str(tmp_path / out), f"data.train={source}", "data.sequence_length=32", *settings]

    run(arguments("whole"))
    source.write_text("\n".join([*good[:24], '{"text": 5}', *good[25:]]))
    assert main(arguments("cut")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    made = [path.name for path in (tmp_path / "cut").glob("checkpoint-*")]
    assert f"{source}:25: field 'text' holds a int, not text; {made[0]} is written: mend the source, and" in error
    assert len(made) == 1
    source.write_text("\n".join(good))
    run([*arguments("cut"), "--resume"])
    assert f"from {made[0]}" in capsys.readouterr().out
    assert same(tmp_path / "whole", tmp_path / "cut")
    source.write_text('{"text": 5}')  # before the first step there is nothing to keep
    assert main(arguments("none")) == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_all_processes_stop_where_a_stream_of_one_cannot_be_read_on(noisy, tmp_path):
    source = tmp_path / "text.jsonl"
    good = [json.dumps({"text": f"document {i} of them all"}) for i in range(64)]
    source.write_text("\n".join([*good[:40], '{"text": 5}', *good[41:]]))
    settings = [f"data.train={source}", "data.streaming=true", "data.window=8", "data.sequence_length=32", "steps=12"]
    command = [sys.executable, "-m", "loopwise", "train", str(noisy), str(tmp_path / "out"), *settings, "batch_size=2"]
    command += ["--launcher", "ddp", "--processes", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    [made] = (path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert ended.returncode == 2
    assert f"text.jsonl:41: field 'text' holds a int, not text; {made} is written" in ended.stderr
    source.write_text("\n".join(good))
    ended = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert f"from {made}" in ended.stdout


def test_refusals_are_one_line(noisy, folder, corpus, tmp_path, capsys):
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "kinds" / "b.txt").write_text("b")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "some words to begin with"}\n' * 9 + '{"text": 5}\n')
    (tmp_path / "other.jsonl").write_text('{"body": "some words"}\n' * 9)
    for settings, message in {
        (f"data.train={folder}", "data.streaming=true"): "a streamed source has no known length: set steps",
        (f"data.train={folder}", "data.streaming=true", "steps=2", "data.eval_fraction=0.1"): "use eval",
        (f"data.train={folder}", "data.streaming=elsewhere", "steps=2"): (
            "'elsewhere' is not among the training sources"
        ),
        (f"data.train=[{folder}, {corpus}]", f"data.streaming={folder}", "steps=2"): "name them in phases",
        (f"data.train={tmp_path / 'kinds'}", "data.streaming=true", "steps=2"): "files beside them: .parquet, .txt",
        (f"data.train={tmp_path / 'nowhere'}", "data.streaming=true", "steps=2"): "no such file or directory",
        (f"data.train={tmp_path / 'empty.jsonl'}", "data.streaming=true", "steps=2"): "no text in it",
        (f"data.train={tmp_path / 'other.jsonl'}", "data.streaming=true", "steps=2"): "no field 'text' among 'body'",
        (f"data.train={tmp_path / 'bad.jsonl'}", "data.streaming=true", "steps=2"): "bad.jsonl",
        (
            f"data.train={folder}", "data.streaming=true", "steps=2",
            f"objectives.distillation={{teacher: {noisy}, top_k: 2}}",
        ): "top_k reads the text before training",
    }.items():  # fmt: skip
        assert main(["train", str(noisy), str(tmp_path / "out"), *settings, "data.sequence_length=16"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "out").exists()
