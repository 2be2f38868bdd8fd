"""A missing model: every command prints one line, without the hub's host name."""

from __future__ import annotations

import pytest

from loopwise.cli import main


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("missing", "no such directory, and no model of the hub (the hub is not asked offline)"),
        ("own/er", "no such directory, and no model of the hub (the hub is not asked offline)"),
        ("./missing", "./missing: no such"),
        ("a/b/c", "a/b/c: no such"),
        ("text.txt", "; give the directory of a"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "eval", "convert", "teacher"])
def test_missing_models_are_one_line(verb, name, rule, plain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.txt").write_text("some words " * 400)
    text = ["data.train=text.txt", "data.sequence_length=16", "steps=1"]
    arguments = {
        "train": ["train", name, "out", *text],
        "eval": ["eval", name, "data=text.txt"],
        "convert": ["convert", name, "out", "sizes=1,1,1"],
        "teacher": ["train", str(plain), "out", *text, f"objectives.distillation.teacher={name}"],
    }[verb]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert rule in error
    assert "http" not in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
