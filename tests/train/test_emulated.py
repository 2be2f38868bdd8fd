"""Who computes in bfloat16 on a processor that emulates it is told so."""

from __future__ import annotations

import pytest
import torch

from loopwise.cli import main
from loopwise.emulated import advice
from tests.helpers.train_tiny import run

CAPABILITY = "get_cpu_capability"
SAID = "this CPU multiplies bfloat16 in emulation: precision=float32 is 2 to 9 times as fast, with twice the memory"


@pytest.mark.parametrize(
    ("capability", "dtype", "device", "told"),
    [
        ("AVX2", "torch.bfloat16", "cpu", True),
        ("AVX2", "float16", "cpu", True),
        ("AVX2", "float32", "cpu", False),
        ("AVX2", "bfloat16", "cuda", False),
        ("AVX512", "bfloat16", "cpu", False),
    ],
)
def test_where(capability, dtype, device, told, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, CAPABILITY, lambda: capability)
    assert (advice(dtype, device, "dtype=float32") is not None) == told


def test_training_and_evaluation_say_it(recurrent, corpus, command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cpu, CAPABILITY, lambda: "AVX2")
    run(command(recurrent, tmp_path / "out", "steps=1", "precision=bfloat16"))
    assert capsys.readouterr().err.splitlines().count(SAID) == 1
    some = [f"data={corpus}", "limit=2", "sequence_length=32"]
    assert main(["eval", str(tmp_path / "out"), *some, "precision=bfloat16"]) == 0
    assert capsys.readouterr().err.splitlines().count(SAID) == 1
    assert main(["eval", str(tmp_path / "out"), *some]) == 0
    assert SAID not in capsys.readouterr().err


def test_generate_says_it(recurrent, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cpu, CAPABILITY, lambda: "AVX2")
    for dtype, count in (("bfloat16", 1), ("float32", 0)):
        assert main(["generate", str(recurrent), "prompt=a", "max_tokens=2", f"dtype={dtype}"]) == 0
        assert capsys.readouterr().err.count("in emulation: dtype=float32 is") == count
