"""Folders with splits, compressed files, cells of tables: read as `datasets` reads them, or refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from loopwise.cli import main
from loopwise.errors import UserError
from loopwise.train.data.documents import documents
from loopwise.train.data.reader import Reader
from loopwise.train.data.stream import Stream
from loopwise.train.recipe import Data
from tests.helpers.train_tiny import run

CARD = "---\nlicense: mit\n---\n# Dataset card\n"
TRAIN, TEST = ["train one", "train two", "train three"], ["TEST one", "TEST two"]


def write(path: Path, texts: list[str]) -> None:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def snapshot(tmp_path) -> Path:
    """A dataset as the hub's client downloads it (CASES.md 17)."""
    folder = tmp_path / "ds"
    write(folder / "data" / "train-00000-of-00001.parquet", TRAIN)
    write(folder / "data" / "test-00000-of-00001.parquet", TEST)
    (folder / "README.md").write_text(CARD)
    return folder


def read(source: Path, **keys) -> list[str]:
    return list(documents([str(source)], Reader(**keys)))


def streamed(source: Path, tokenizer, **keys) -> set[str]:
    """The documents in a window that holds all, without remainders that fill no block."""
    data = Data.model_validate({"train": [str(source)], "streaming": True, "window": 12, "sequence_length": 2, **keys})
    window = Stream([str(source)], data, tokenizer, 0, None).first_window().tokens
    return {chr(c) for c in tokenizer.decode(window.ravel().tolist()).encode() if 65 <= c <= 90}


def test_a_snapshot_gives_the_split_that_is_asked_for(snapshot, tokenizer):
    import datasets

    assert read(snapshot) == read(snapshot, split="train") == TRAIN
    assert read(snapshot, split="test") == TEST
    loaded = datasets.load_dataset(str(snapshot), split="train", cache_dir=str(snapshot.parent / "cache"))
    assert list(loaded["text"]) == TRAIN
    with pytest.raises(UserError, match="no split 'dev'; it has 'train', 'test'"):
        read(snapshot, split="dev")
    assert not streamed(snapshot, tokenizer)
    assert streamed(snapshot, tokenizer, split="test") == set("TEST")


def test_folders_with_names_of_splits(tmp_path):
    write(tmp_path / "named" / "train.jsonl", TRAIN)
    write(tmp_path / "named" / "test.jsonl", TEST)
    assert read(tmp_path / "named") == TRAIN
    assert read(tmp_path / "named", split="test") == TEST
    write(tmp_path / "deep" / "train" / "a.jsonl", TRAIN)
    write(tmp_path / "deep" / "validation" / "b.jsonl", TEST)
    assert read(tmp_path / "deep", split="validation") == TEST
    card = "---\nconfigs:\n- config_name: x\n  data_files: x/*.jsonl\n- config_name: y\n  data_files: y/*.jsonl\n---\n"
    write(tmp_path / "configs" / "x" / "q.jsonl", TRAIN)
    write(tmp_path / "configs" / "y" / "z.jsonl", TEST)
    (tmp_path / "configs" / "README.md").write_text(card)
    assert read(tmp_path / "configs", subset="y") == TEST
    with pytest.raises(UserError, match="choose a subset of it: x, y"):
        read(tmp_path / "configs")
    write(tmp_path / "plain" / "one.jsonl", TRAIN)
    write(tmp_path / "plain" / "two.jsonl", TEST)
    assert read(tmp_path / "plain") == [*TRAIN, *TEST]


@pytest.mark.parametrize("other", ["load.py", "fig.png", "notes.txt"])
def test_other_files_beside_the_splits_change_nothing(tmp_path, other):
    write(tmp_path / "train.jsonl", TRAIN)
    write(tmp_path / "test.jsonl", TEST)
    (tmp_path / other).write_text("words that are no data")
    assert read(tmp_path) == TRAIN
    assert read(tmp_path, split="test") == TEST


def test_texts_with_a_card_have_splits(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "train.txt").write_text("one text")
    (tmp_path / "test.txt").write_text("another")
    assert read(tmp_path) == ["one text"]
    (tmp_path / "README.md").unlink()
    assert sorted(read(tmp_path)) == ["another", "one text"]


def test_endings_may_be_capitals(tmp_path):
    write(tmp_path / "UP.JSONL", TRAIN)
    assert read(tmp_path / "UP.JSONL") == TRAIN


@pytest.mark.parametrize(
    ("source", "setting", "rule"),
    [
        ("text.txt", "data.split=train", "have no splits"),
        ("text.txt", "data.subset=en", "it belongs to datasets of the hub"),
        ("text.txt", "data.text_field=body", "text files and generated tasks have no fields"),
        ("plain", "data.split=test", "have no splits"),
        ("plain", "data.subset=en", "it belongs to datasets of the hub"),
        ("saved", "data.split=test", "have no splits"),
        ("saved", "data.subset=en", "it belongs to datasets of the hub"),
        ("saved", "data.cache=kept", "it keeps tokens of local files"),
    ],
)
def test_settings_that_a_source_has_no_use_for(source, setting, rule, plain, tmp_path, capsys):
    import datasets

    (tmp_path / "text.txt").write_text("some words of text " * 40)
    write(tmp_path / "plain" / "one.jsonl", TRAIN * 20)
    datasets.Dataset.from_dict({"text": TRAIN * 20}).save_to_disk(tmp_path / "saved")
    keys = [f"data.train={tmp_path / source}", "data.sequence_length=16", "steps=1"]
    capsys.readouterr()  # the progress of datasets
    assert main(["train", str(plain), str(tmp_path / "out"), *keys, setting]) == 2
    error = capsys.readouterr().err
    key = setting.partition("=")[0]
    assert error.startswith(f"loopwise: error: {setting} has no effect: ")
    assert rule in error
    assert len(error.splitlines()) == 1
    if key in ("data.split", "data.text_field"):
        arguments = ["eval", str(plain), f"data={tmp_path / source}", "sequence_length=16"]
        assert main([*arguments, setting.removeprefix("data.")]) == 2
        assert "has no effect" in capsys.readouterr().err


def test_a_snapshot_is_trained_on(snapshot, plain, tmp_path):
    write(snapshot / "data" / "train-00000-of-00001.parquet", TRAIN * 20)
    keys = [f"data.train={snapshot}", "data.split=train", "data.sequence_length=16", "steps=1"]
    run(["train", str(plain), str(tmp_path / "out"), *keys])


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_files(ending, pack, tokenizer, tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEST).encode()
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(lines))
    assert read(tmp_path / f"a.jsonl{ending}") == TEST
    (tmp_path / f"a.txt{ending}").write_bytes(pack(b"A\r\nB"))
    assert read(tmp_path / f"a.txt{ending}") == ["A\nB"]
    assert streamed(tmp_path / f"a.jsonl{ending}", tokenizer) == set("TEST")
    (tmp_path / f"cut.jsonl{ending}").write_bytes(pack(lines * 50)[:-9])
    with pytest.raises(UserError, match=rf"cut\.jsonl{ending}: "):
        read(tmp_path / f"cut.jsonl{ending}")


def test_other_compressions_are_refused_by_name(tokenizer, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    (tmp_path / "folder" / "a.jsonl").write_text('{"text": "x"}\n')
    for source in (tmp_path / "folder" / "a.jsonl.zst", tmp_path / "folder"):
        with pytest.raises(UserError, match=r"a\.jsonl\.zst: \.zst files are not read; unpack it, or compress it as"):
            read(source)
        with pytest.raises(UserError, match=r"\.zst files are not read"):
            streamed(source, tokenizer)


def test_cells_of_tables(tokenizer, tmp_path, capsys):
    """NA, null and 007 are text; a null of a table is a bad record, and named."""
    import datasets

    (tmp_path / "a.csv").write_text('text,n\nNA,1\nnull,2\n007,3\n"A, B",4\n')
    assert read(tmp_path / "a.csv") == ["NA", "null", "007", "A, B"]
    assert streamed(tmp_path / "a.csv", tokenizer) == set("NAB")
    datasets.Dataset.from_dict({"text": ["one", None, "two"]}).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", skip=True) == ["one", "two"]
    assert "a.parquet row 1: field 'text' holds a NoneType, not text" in capsys.readouterr().err
    (tmp_path / "latin.csv").write_bytes("text\nschön\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.csv:2: not UTF-8"):
        read(tmp_path / "latin.csv")


def test_json_that_python_refuses(tmp_path):
    for name, text, message in (
        ("deep.json", "[" * 100_000, "JSON that nests too deeply"),
        ("long.json", '[{"text": ' + "9" * 5000 + "}]", r"not JSON \(Exceeds the limit"),
        ("cut.json", '[{"text": "a"},\n {"text": ]', r"not JSON \(Expecting value at line 2 column 11\)"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name}: {message}"):
            read(tmp_path / name)
