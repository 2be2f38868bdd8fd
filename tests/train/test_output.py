"""OUT of a run: no file of the user is removed, in it or beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loopwise.cli import main
from loopwise.directory import is_ours
from loopwise.lock import RUN
from tests.helpers.train_tiny import run

RECORD = '{"loopwise": "0.1.0"}'
HEADER = "# loopwise 0: loopwise train model out\n"


def make(out: Path, kind: str) -> None:
    """The contents of OUT: none, a directory of the user, a run that was killed early, the same with a note."""
    if kind == "absent":
        return
    out.mkdir()
    if kind == "foreign":
        (out / "precious").write_text("mine")
    elif kind == "config alone":
        (out / "config.json").write_text("{}")
    elif kind == "copied recipe":
        (out / "train_recipe.yaml").write_text(HEADER)
        (out / "precious").write_text("mine")
    elif kind.startswith("killed"):
        (out / "train_recipe.yaml").write_text(HEADER)
        (out / "tokens").mkdir()
        (out / "tokens" / "train.npy").write_text("")
        if kind == "killed, with a note":
            (out / "precious").write_text("mine")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


STANDING = ["absent", "empty", "foreign", "config alone", "copied recipe", "killed", "killed, with a note"]
# Contents that --force replaces; an absent or empty OUT needs no --force.
REPLACED = {"killed"}


@pytest.mark.parametrize("options", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize("sibling", ["living", "dead", "no number"])
@pytest.mark.parametrize("standing", STANDING)
def test_a_refused_run_removes_nothing_of_the_users(standing, sibling, options, dead, command, tmp_path, capsys):
    out = tmp_path / "out"
    make(out, standing)
    number = {"living": os.getppid(), "dead": dead, "no number": "mine"}[sibling]
    old = tmp_path / f".out.old-{number}"
    old.mkdir()
    (old / "loopwise.json").write_text(RECORD)
    (old / "weights").write_text("replaced")
    before = files(tmp_path)
    assert main(command(tmp_path / "missing", out, "steps=2", *options)) == 2
    assert "Traceback" not in capsys.readouterr().err
    after = files(tmp_path)
    if sibling == "dead" and standing in ("absent", "empty", "killed"):  # what it was to replace is back
        assert after == {"out/loopwise.json": RECORD.encode(), "out/weights": b"replaced"}
    elif sibling == "dead" and standing in ("copied recipe", "killed, with a note"):
        assert after.items() >= {"out/precious": b"mine", f"{old.name}/weights": b"replaced"}.items()
    else:
        assert after == before


def test_what_is_only_named_as_ours_is_left(dead, plain, command, corpus, tmp_path):
    """Leftovers of a killed run have a record, or a known name in OUT: beside OUT, in it, and among cached tokens."""
    out, kept = tmp_path / "out", tmp_path / "kept"
    run(command(plain, out, "steps=1", "save_every=1", f"data.cache={kept}"))
    [entry] = kept.iterdir()
    shutil.rmtree(entry)
    places = [f"{place}.partial-{dead}" for place in (tmp_path / ".out", kept / f".{entry.name}")]
    theirs, ours = ([f"{place}-{run}" for place in places] for run in ("0123456789ab", "0123456789cd"))
    for folder in (*theirs, *ours):
        Path(folder).mkdir()
        (Path(folder) / "precious").touch()
    for folder in ours:
        (Path(folder) / "loopwise.json").write_text('{"loopwise": "0.1.0"}')
    (out / ".mine.partial").mkdir()
    (out / ".checkpoint-7.partial").mkdir()
    (out / "config.json").unlink()  # there is a run to go on with
    run([*command(plain, out, "steps=1", "save_every=1", f"data.cache={kept}"), "--resume"])
    assert [Path(folder).exists() for folder in theirs] == [True, True]
    assert [Path(folder).exists() for folder in ours] == [False, False]
    assert (out / ".mine.partial").is_dir()
    assert not (out / ".checkpoint-7.partial").exists()


def test_tokens_that_cannot_be_kept_are_one_line(plain, command, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(command(plain, tmp_path / "out", "steps=1", f"data.cache={tmp_path / 'file'}")) == 2
    assert f"data.cache={tmp_path / 'file'}: cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("out", "settings", "message"),
    [
        ("theirs", [], "theirs: not empty; choose another directory"),
        ("theirs", ["--force"], "--force replaces an earlier run or a model that Loopwise wrote"),
        ("theirs", ["--resume"], "theirs: no run to resume in it"),
        ("ours", [], "--force replaces it, or choose another directory"),
        ("file", [], "file is a file; give a directory for the output"),
        ("file/out", [], "file, and that is no directory; choose another directory"),
        ("model/out", [], "lies in the source"),
        ("model", ["--force"], "lies in the source"),
        ("", [], "holds the source"),
        (".", [], "OUT is '.'; name a directory to be made"),
        ("closed/out", [], "closed, and nothing may be written there; choose another directory"),
        ("out", ["data.train=out/text.jsonl"], "lies in OUT"),
        ("out", ["data.bad_records=skip", "data.train=task:hops"], "data.bad_records=skip has no effect"),
    ],
)
def test_a_dry_run_says_what_would_refuse_the_run(
    out, settings, message, options, plain, command, tmp_path, monkeypatch, capsys
):
    here = tmp_path / "here"
    for name in ("theirs", "ours", "closed"):
        (here / name).mkdir(parents=True)
        (here / name / "precious").touch()
    (here / "ours" / "loopwise.json").write_text('{"loopwise": "0.1.0"}')
    (here / "file").touch()
    shutil.copytree(plain, here / "model")
    monkeypatch.chdir(here)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path) and access(path, mode))
    before = files(tmp_path)
    place = here / out if out != "." else Path(out)
    assert main([*command(here / "model", place, "steps=1"), *settings, *options]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert files(tmp_path) == before


@pytest.mark.parametrize("standing", STANDING)
def test_force_replaces_what_is_ours_alone(standing, plain, command, tmp_path, capsys):
    out = tmp_path / "out"
    make(out, standing)
    before = files(out) if out.exists() else {}
    replaced = standing in REPLACED or not before
    assert main(command(plain, out, "steps=1", "--force")) == (0 if replaced else 2)
    if replaced:
        assert (out / "model.safetensors").is_file()
    else:
        assert files(out) == before
        told = capsys.readouterr().err
        assert ("and not precious" if standing == "killed, with a note" else "--force replaces an earlier run") in told


def test_a_run_that_fails_leaves_what_others_put_beside_it(plain, command, tmp_path, monkeypatch, capsys):
    """Before the first checkpoint: the directory that --force replaced comes back, or stays beside the user's files."""
    from loopwise.train import run as running

    out = tmp_path / "out"
    run(command(plain, out, "steps=1"))

    def fail(*_, **__):
        (out / "precious").write_text("mine")
        raise RuntimeError("as the machine wills")

    monkeypatch.setattr(running, "work", fail)
    with pytest.raises(RuntimeError):
        main(command(plain, out, "steps=1", "--force"))
    assert files(out) == {"precious": b"mine"}
    assert (tmp_path / f".out.old-{os.getpid()}-{RUN}" / "model.safetensors").is_file()
    assert "what --force was to replace is in" in capsys.readouterr().err
    shutil.rmtree(out)


def test_a_link_at_out_is_followed(plain, command, tmp_path):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    run(command(plain, tmp_path / "link", "steps=1"))
    run([*command(plain, tmp_path / "link", "steps=1"), "--force"])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "run" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize("out", ["file/run", "n" * 300])
def test_an_out_that_cannot_be_made_is_one_line(out, plain, command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(command(plain, tmp_path / out, "steps=1")) == 2
    error = capsys.readouterr().err
    assert error.startswith("loopwise: error: ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "records", [{"loopwise.json": "notes to myself"}, {"train_recipe.yaml": "# loopwise recipe of mine\n"}]
)
def test_what_only_looks_like_a_record_is_none(records, tmp_path):
    for name, text in records.items():
        (tmp_path / name).write_text(text)
    assert not is_ours(tmp_path)
