"""Documents out of files, directories, globs and datasets."""

from __future__ import annotations

import pytest

from loopwise.errors import UserError
from loopwise.train.data.documents import documents
from loopwise.train.data.reader import Reader


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
