"""Tables of outputs: what stands at OUT, `--force` and SOURCE in, the place or a rejection out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loopwise.directory import (
    RECORD,
    RUN_RECORD,
    check_file,
    check_new,
    check_replaceable,
    is_ours,
    new_directory,
    new_file,
    place,
    removable,
    settle,
)
from loopwise.disk import system_error
from loopwise.errors import UserError
from loopwise.lock import RUN

OURS = {RECORD: '{"loopwise": "0.1.0"}'}
GONE = 999999999  # no process has this number
ENDED = f"{GONE}-0123456789ab"  # a run that held a lock, and has ended
TREES: dict[str, dict[str, str] | None] = {
    "nothing": None,
    "empty": {},
    "a model": OURS,
    "a training run": {RUN_RECORD: "# loopwise 0.1.0: loopwise train source out\n"},
    "a recipe by hand": {RUN_RECORD: "steps: 1\n"},
    "another's files": {"notes.txt": "x"},
    "a list as record": {RECORD: "[]"},
    "a record that is no JSON": {RECORD: "{"},
    "another's record": {RECORD: '{"name": "x"}'},
}


def grow(path: Path, files: dict[str, str] | None) -> Path:
    """A directory with these files; nothing for None."""
    if files is not None:
        path.mkdir()
        for name, text in files.items():
            (path / name).write_text(text)
    return path


@pytest.mark.parametrize(("tree", "ours"), [(name, name in ("a model", "a training run")) for name in TREES])
def test_the_record_tells_ours(tree, ours, tmp_path):
    assert is_ours(grow(tmp_path / "out", TREES[tree])) == ours


@pytest.mark.parametrize(
    ("tree", "force", "message"),
    [
        ("nothing", False, None),
        ("empty", False, None),
        ("empty", True, None),
        ("a model", True, None),
        ("a training run", True, None),
        ("a model", False, "{out} is not empty; choose another directory, or replace it with --force"),
        ("another's files", False, "{out} is not empty; choose another directory"),
        (
            "another's files",
            True,
            "{out}: --force replaces only what Loopwise wrote, and this directory has no loopwise.json; choose another "
            "one",
        ),
    ],
)
def test_replacing(tree, force, message, tmp_path):
    out = grow(tmp_path / "out", TREES[tree])
    if message is None:
        check_replaceable(out, force)
        return
    with pytest.raises(UserError) as error:
        check_replaceable(out, force)
    assert str(error.value) == message.format(out=out)


@pytest.mark.parametrize(
    ("out", "source", "message"),
    [
        ("out", None, None),
        ("new/deep/out", None, None),
        ("out", "source", None),
        ("out", "an/id", None),  # of the hub
        ("", None, "OUT is '.'; name a directory to be made, it replaces what stands there"),
        ("file", None, "{root}/file is a file; give a directory for the output"),
        (
            "file/out",
            None,
            "the output {root}/file/out would be made in {root}/file, and that is no directory; choose another "
            "directory",
        ),
        (
            "source/out",
            "source",
            "the output {root}/source/out lies in the source {root}/source; choose another directory",
        ),
        (
            "source",
            "source/inner",
            "the output {root}/source holds the source {root}/source/inner and would replace it; choose another "
            "directory",
        ),
        (
            "source",
            "source",
            "the output {root}/source lies in the source {root}/source; choose another directory",
        ),
    ],
)
def test_places(out, source, message, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "source" / "inner").mkdir(parents=True)
    asked = tmp_path / out if out else Path()
    read = None if source is None else tmp_path / source
    if message is None:
        assert place(asked, read) == asked
        return
    with pytest.raises(UserError) as error:
        place(asked, read)
    assert str(error.value) == message.format(root=tmp_path)


def test_a_mount_point_is_not_replaced():
    """A rename onto it would fail after the work is done."""
    assert os.path.ismount("/proc")
    with pytest.raises(UserError, match="/proc is a mount point, which nothing can replace; name a directory inside"):
        check_new(Path("/proc"), None, force=True)


def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch):
    out = grow(tmp_path / "out", OURS)
    (out / "inner").mkdir()
    monkeypatch.chdir(out / "inner")
    with pytest.raises(UserError, match="holds the current directory and would replace it"):
        check_new(out, None, force=True)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("new", None),
        ("file", None),
        ("folder", "--out {root}/folder is a directory; name a file"),
        ("none/new", "--out {root}/none/new: no such directory"),
    ],
)
def test_files(file, message, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    if message is None:
        check_file(tmp_path / file)
        return
    with pytest.raises(UserError) as error:
        check_file(tmp_path / file)
    assert str(error.value) == message.format(root=tmp_path)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [("empty", True), ("a model", True), ("another's files", False), ("nothing", False)],
)
def test_removable(tree, expected, tmp_path):
    assert removable(grow(tmp_path / "out", TREES[tree])) == expected
    if tree == "a model":
        (tmp_path / "link").symlink_to(tmp_path / "out")
        assert not removable(tmp_path / "link")


@pytest.mark.parametrize(
    ("before", "left", "after"),
    [
        (None, {f".out.partial-{ENDED}": OURS}, None),
        (None, {f".out.old-{ENDED}": {**OURS, "kept": "x"}}, "kept"),  # put back
        ({**OURS, "new": "x"}, {f".out.old-{ENDED}": OURS}, "new"),  # replaced already
        (None, {f".out.partial-{os.getpid()}-{RUN}": OURS}, None),  # of this process
        (None, {f".out.partial-{ENDED}": {"notes.txt": "x"}}, None),  # another's
        # Earlier releases have no lock: a process id proves nothing, so nothing is deleted.
        (None, {f".out.partial-{GONE}": OURS}, None),
        (None, {f".out.old-{GONE}": {**OURS, "kept": "x"}}, "kept"),
        ({**OURS, "new": "x"}, {f".out.old-{GONE}": OURS}, "new"),
        (None, {f".out.old-{os.getppid()}": OURS}, None),
        (None, {".out.partial-notanumber": OURS}, None),
    ],
)
def test_leftovers_of_killed_processes(before, left, after, tmp_path):
    out = grow(tmp_path / "out", before)
    for name, files in left.items():
        grow(tmp_path / name, files)
    settle(out)
    kept = {name for name, files in left.items() if not name.endswith(ENDED) or RECORD not in files}
    kept -= {name for name in left if after == "kept"}
    assert {path.name for path in tmp_path.iterdir()} == kept | ({"out"} if after else set())
    assert after is None or (out / after).exists()


@pytest.mark.parametrize(
    ("tree", "force", "fails", "content"),
    [
        ("nothing", False, False, {"made", RECORD}),
        ("nothing", False, True, None),
        ("a model", True, False, {"made", RECORD}),
        ("a model", True, True, {RECORD}),
    ],
)
def test_a_directory_appears_whole_or_not_at_all(tree, force, fails, content, tmp_path):
    out = grow(tmp_path / "out", TREES[tree])

    def make() -> None:
        with new_directory(out, None, force) as partial:
            (partial / "made").write_text("x")
            if fails:
                raise KeyError("stop")

    if fails:
        with pytest.raises(KeyError):
            make()
    else:
        make()
    assert (None if not out.exists() else {path.name for path in out.iterdir()}) == content
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if content else [])


@pytest.mark.parametrize(("fails", "text"), [(False, "new"), (True, "old")])
def test_a_file_is_replaced_whole_or_not_at_all(fails, text, tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    try:
        with new_file(file) as partial:
            partial.write_text("new")
            if fails:
                raise KeyError("stop")
    except KeyError:
        assert fails
    assert file.read_text() == text
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (RuntimeError("No space left"), None),
        (ValueError("x"), None),
    ],
)
def test_errors_of_the_system(error, told):
    assert system_error(error) == told
