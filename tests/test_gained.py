"""`python -m bench.gained`: a tiny run whole and in parts, its files, and the way back from them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import gained, parts
from loopwise.errors import UserError
from tests.helpers.repository import ROOT


def ended(module: str, *argv: object) -> str:
    """The output of a command that ends with exit code 0."""
    command = [sys.executable, "-m", module, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(model / "model.safetensors") for model in (one, other))
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_tiny_run_is_reported_joined_and_resumed(tmp_path):
    whole, halves, joined = (tmp_path / name for name in ("whole", "halves", "joined"))
    said = ended("bench.gained", "make", whole, "--tiny", "--plain", "--seconds", 500)
    assert "steps fit in 500 s, the run has 5" in said
    assert "finished: " in said

    out = tmp_path / "results"
    page = ["--tiny", "--out", out, "--report", out / "page.md", "--images", out / "images"]
    ended("bench.results", "report", "--real", whole / "gained", *page)
    section = (out / "page.md").read_text().partition("## (f)")[2]
    assert "The loss on text stays within 0.05 of the source at R = 1, 2, 3, 4, 5, 6, 7, 8" in section
    assert "loopwise train converted model --recipe=hops-code" in section

    assert "| plain, the same FLOPs |" in section

    ended("bench.gained", "join", whole / "converted", whole / "parts", joined)
    assert same(joined, whole / "model")
    assert not same(joined, whole / "converted")
    assert (joined / "config.json").read_bytes() == (whole / "model" / "config.json").read_bytes()

    shutil.copytree(whole, halves, symlinks=True)
    for made in ("model", *gained.MODEL_FILES[2:], "parts", "gained"):
        path = halves / made
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        (halves / "jobs" / f"{made}.json").unlink(missing_ok=True)
    assert "paused after 0 s: stopped by SIGTERM: checkpoint-1 is written" in ended(
        "bench.gained", "make", halves, "--tiny", "--seconds", 0
    )
    assert (halves / "model" / "checkpoint-1").is_dir()
    assert not (halves / "source.json").exists()
    assert "finished: " in ended("bench.gained", "make", halves, "--tiny")
    assert same(halves / "model", whole / "model")
    assert json.loads((halves / "jobs" / "model.json").read_text())["attempts"] == 2


@pytest.fixture
def models(tmp_path) -> tuple[Path, Path]:
    """A model, and the same one with two tensors trained: one of 2.4 MB, one without dimensions."""
    weights = {"large": torch.randn(600, 1000), "kept": torch.randn(300_000), "scale": torch.tensor(1.0)}
    trained = {**weights, "large": weights["large"] + 1, "scale": torch.tensor(0.5)}
    for name, tensors in (("converted", weights), ("trained", trained)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "x"}))
    (tmp_path / "trained" / "run.json").write_text("{}")
    return tmp_path / "converted", tmp_path / "trained"


def test_parts_are_small_and_joined_are_the_trained_model(models, tmp_path):
    converted, trained = models
    files = parts.cut(converted, trained, tmp_path / "parts", torch.float32, 1)
    assert len(files) == 3
    assert max(file.stat().st_size for file in files) <= 2**20
    assert not any("kept" in name for file in files for name in load_file(file))
    assert [path.name for path in (tmp_path / "parts" / "model").iterdir()] == ["run.json"]
    parts.join(converted, tmp_path / "parts", tmp_path / "joined")
    assert same(tmp_path / "joined", trained)
    assert {path.name for path in (tmp_path / "joined").iterdir()} == {"config.json", "run.json", "model.safetensors"}


def test_parts_in_bfloat16_are_rounded_and_half_as_large(models, tmp_path):
    converted, trained = models
    (file,) = parts.cut(converted, trained, tmp_path / "parts", torch.bfloat16, 2)
    assert file.stat().st_size < 1_300_000
    parts.join(converted, tmp_path / "parts", tmp_path / "joined")
    found, exact = (load_file(model / "model.safetensors") for model in (tmp_path / "joined", trained))
    assert found["large"].dtype == torch.float32
    assert torch.equal(found["large"], exact["large"].bfloat16().float())
    assert torch.equal(found["kept"], exact["kept"])


def test_parts_of_another_model_and_damaged_ones_are_refused(models, tmp_path):
    converted, trained = models
    folder, out = tmp_path / "parts", tmp_path / "joined"
    first, *_ = parts.cut(converted, trained, folder, torch.float32, 1)
    with pytest.raises(UserError, match=r"is not the model that .* was cut from"):
        parts.join(trained, folder, out)
    with pytest.raises(UserError, match="exists; name a new directory"):
        parts.join(converted, folder, trained)
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"part-1.safetensors: missing, or other than what was cut"):
        parts.join(converted, folder, out)
    with pytest.raises(UserError, match=r"no parts.json in it"):
        parts.join(converted, trained, out)
    assert not out.exists()


def test_absent_packages_are_named_with_what_to_do(tmp_path, monkeypatch, capsys):
    (tmp_path / "m.gguf").write_text("")
    monkeypatch.setitem(sys.modules, "datasets", None)  # needed by nothing here
    gained.check_packages(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert gained.main(["make", str(tmp_path / "m.gguf"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "gained: error: this Python lacks gguf: where there is a network, run `pip install --target"
    )
    assert error.endswith("or give a model directory in place of the GGUF file\n")
    gained.check_packages(tmp_path)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(gained.Failed, match="lacks pyyaml"):
        gained.check_packages(tmp_path)


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        (["none", "OUT"], "none"),
        (["model", "OUT", "--text", "t.jsonl", "--held-out", "h.jsonl"], "t.jsonl"),
        (["model", "OUT", "--text", "h.jsonl", "--held-out", "t.jsonl"], "t.jsonl"),
    ],
)
def test_missing_files_are_one_line(argv, missing, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("h.jsonl").touch()
    assert gained.main(["make", *argv]) == 2
    assert capsys.readouterr().err == f"gained: error: {missing}: no such file or directory\n"
    assert not Path("OUT").exists()


def test_settings_of_the_caller_replace_those_of_the_run():
    args = gained.arguments(["make", "m", "out", "--core", "--set", "compile=none", "--set=batch_size=8"])
    settings = gained.training(args, gpu=False)
    assert settings.count("batch_size=8") == 1
    assert "batch_size=4" not in settings
    assert settings[-1] == "compile=none"
    assert "optimiser.train=core,injection" in settings
    tiny = gained.arguments(["make", "out", "--tiny"])
    assert (tiny.source, tiny.out, tiny.steps) == (None, Path("out"), gained.TINY_STEPS)


def test_text_is_cut_at_ends_of_lines():
    lines = [f"line {number}\n" for number in range(1000)]
    pieces = [*gained.cut_at_lines("".join(lines))]
    assert "".join(pieces) == "".join(lines)
    assert all(gained.PIECE <= len(piece) < gained.PIECE + 10 for piece in pieces[:-1])
    assert all(piece.endswith("\n") for piece in pieces)
