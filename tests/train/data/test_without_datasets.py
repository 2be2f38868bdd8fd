"""Without the `datasets` library, text and JSON lines are read, and other sources say what they need."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from loopwise.errors import UserError
from loopwise.train.data.documents import documents
from loopwise.train.data.reader import Reader
from loopwise.train.data.stream import stream_of
from loopwise.train.data.tables import one_line_errors


@pytest.fixture(autouse=True)
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import fails, and find_spec gives None


@pytest.fixture
def reader() -> Reader:
    return Reader("text", "train", None, chat=False, skip=False)


def test_what_needs_no_library_is_read(tmp_path, reader):
    lines, folder = tmp_path / "a.jsonl", tmp_path / "texts"
    lines.write_text(json.dumps({"text": "one"}) + "\n")
    folder.mkdir()
    (folder / "b.txt").write_text("two")
    assert [*documents([str(lines), str(folder)], reader)] == ["one", "two"]
    with one_line_errors(str(lines)):  # as a stream is opened
        assert [*stream_of(str(lines), reader)] == [{"text": "one"}]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("source", ["table.parquet", "owner/name"])
def test_what_needs_the_library_says_so(source, streamed, tmp_path, reader, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "table.parquet")
    read = stream_of if streamed else lambda source, reader: [*documents([source], reader)]
    with pytest.raises(UserError, match=f"^{source} needs the datasets library: .*or give a file"):
        read_guarded(read, source, reader)


def read_guarded(read: Callable[[str, Reader], Any], source: str, reader: Reader) -> None:
    """Read as a stream does, whose caller turns errors of libraries into lines."""
    with one_line_errors(source):
        read(source, reader)
