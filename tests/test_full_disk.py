"""A file system that is really full, in bytes or in files: one line, nothing half-written, nothing lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loopwise.cli import main
from tests.helpers.namespace import LOOPWISE, run
from tests.helpers.tiny import save_source
from tests.helpers.train_tiny import same


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a model, its conversion and a text."""
    folder = tmp_path_factory.mktemp("models")
    save_source(folder / "source")
    assert main(["convert", str(folder / "source"), str(folder / "model"), "sizes=2,2,2", "num_recurrences=2"]) == 0
    (folder / "text.txt").write_text("the core runs again while depth grows with every pass\n\n" * 100)
    return folder


CONVERT = f"{LOOPWISE} convert source small/out sizes=2,2,2 num_recurrences=2"
FULL = {  # of a conversion of 920 KiB, and 270 KiB beside the weights -> the system's option, the words
    "room": ("size=600k", "the output will take 0.9 MiB, and 0.6 MiB are free there; make room first"),
    "bytes": ("size=1000k", "No space left on device"),
    "files": ("nr_inodes=5", "No space left on device"),
}


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("room", "files")]


@pytest.mark.parametrize("kind", ["bytes", *SLOW])
def test_convert_leaves_nothing(kind, models, tmp_path):
    shutil.copytree(models / "source", tmp_path / "source")
    (tmp_path / "small").mkdir()
    option, words = FULL[kind]
    ended = run(f"mount -t tmpfs -o {option} none small && {CONVERT}; echo $?; ls -A small", tmp_path)
    errors = [line for line in ended.stderr.splitlines() if "error" in line]
    assert len(errors) == 1, ended.stderr
    assert words in errors[0]
    assert ended.stdout.splitlines()[-1] == "2", ended.stdout  # and no name of a file behind it


@pytest.mark.slow
def test_train_keeps_its_checkpoint_and_goes_on_once_there_is_room(models, tmp_path):
    """The second checkpoint does not fit. After a larger mount, --resume ends as an undisturbed run does."""
    for name in ("model", "text.txt"):
        (shutil.copytree if name == "model" else shutil.copy)(models / name, tmp_path / name)
    settings = "data.train=text.txt data.sequence_length=32 batch_size=2 steps=6 save_every=2 keep_checkpoints=9"
    assert main(["train", *(str(tmp_path / n) for n in ("model", "whole")), *at(tmp_path, settings)]) == 0
    one = sum(file.stat().st_size for file in (tmp_path / "whole/checkpoint-2").rglob("*"))
    size = int(one * 1.7) // 1024 + 200
    (tmp_path / "small").mkdir()
    train = f"{LOOPWISE} train model small/out {settings}"
    script = f"""
        mount -t tmpfs -o size={size}k none small || exit 9
        {train}; echo first $?
        ls -A small small/out; test -e small/out/checkpoint-4 && echo half
        mount -o remount,size=100m small || exit 9
        {train} --resume; echo second $?
        cp -r small/out done"""
    ended = run(script, tmp_path)
    assert "first 2" in ended.stdout, ended.stdout + ended.stderr
    errors = [line for line in ended.stderr.splitlines() if "error" in line]
    assert len(errors) == 1, ended.stderr
    assert "checkpoint-4 cannot be written to small/out (No space left on device; " in errors[0]
    assert "half" not in ended.stdout.splitlines()
    assert ".partial" not in ended.stdout
    assert "from checkpoint-2" in ended.stdout
    assert "second 0" in ended.stdout, ended.stderr
    assert same(tmp_path / "done", tmp_path / "whole")


def at(folder: Path, settings: str) -> list[str]:
    return settings.replace("text.txt", str(folder / "text.txt")).split()
