"""The whole demo on SmolLM2, with a tenth of the small model's training: every step, what it says, and what is left."""

from __future__ import annotations

import json

import pytest

from loopwise.demo import __main__ as demo
from loopwise.demo import processes

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("vllm")]


def test_the_demo_runs_from_the_file_to_the_pictures(smollm2, tmp_path, monkeypatch, capfd):
    step, commands = processes.step, []

    def shorter(shown, command):
        commands.append(shown)
        step(shown, [*command, "steps=100"] if command[-2:] == ["hops", "seed=1"] else command)

    monkeypatch.setattr(processes, "step", shorter)
    out = tmp_path / "run"
    assert demo.main(["--model", str(smollm2), "--out", str(out)]) == 0

    def losses(name):
        return {
            row["num_recurrences"]: row["loss"] for row in json.loads((out / f"{name}.json").read_text())["results"]
        }

    source, converted, retrained = losses("source"), losses("converted"), losses("retrained")
    assert converted[1] == pytest.approx(source[None], abs=1e-4)
    assert retrained[1] < converted[1]
    for depth in (2, 3, 4):
        assert converted[depth] > converted[1] + 0.01  # what the training mends
        assert retrained[depth] < converted[1]
    [by_rule] = json.loads((out / "served-by-rule.json").read_text())["results"]
    assert by_rule["groups"]["1"]["accuracy"] > 0.9
    assert 1 < by_rule["mean_recurrences"] < 16
    shown = capfd.readouterr().out
    assert [line.removeprefix("$ ") for line in shown.splitlines() if line.startswith("$ loopwise serve")]
    assert all(f"$ {command}" in shown for command in commands)
    for picture in ("accuracy.png", "depth.png"):
        assert str(out / picture) in shown
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
