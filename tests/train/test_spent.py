"""The steps, tokens and FLOPs of a run in its record, over resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from loopwise.cli import main
from loopwise.convert.inspection import flops_per_token
from loopwise.disk import checksum
from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.train.curriculum import Depth
from loopwise.train.measure import parameter_costs, token_flops
from loopwise.train.optimisers import freeze
from loopwise.train.pretrained import load_model
from loopwise.train.recipe import Objectives, Optimiser
from tests.helpers.tiny import source_config
from tests.helpers.train_tiny import run


def record(path: Path) -> dict[str, float]:
    return json.loads((path / "run.json").read_text())["spent"]


def by_hand(model: Path, recurrences: list[int], tokens_per_step: int) -> float:
    """6 FLOPs for each weight, each time that a token meets it. The tied embedding counts as the head."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    sizes = {name: sum(p.numel() for p in loaded.get_submodule(name).parameters()) for name in ("core", "injection")}
    looped = sum(sizes.values())
    once = sum(p.numel() for p in loaded.parameters()) - looped
    return sum(6 * (once + r * looped) * tokens_per_step for r in recurrences)


def test_a_run_records_what_it_spent(recurrent, command, tmp_path, capsys):
    """Also a resumed one, and one that goes on from a checkpoint of a release that did not count tokens."""
    settings = ["steps=6", "save_every=2", "gradient_accumulation=2", "log_every=4", "recurrence.schedule=steps"]
    settings.append("recurrence.levels={0: 1, 0.5: 3}")
    whole = tmp_path / "whole"
    run(command(recurrent, whole, *settings))
    tokens = 4 * 2 * 32
    expected = {
        steps: {
            "steps": steps,
            "tokens": steps * tokens,
            "flops": pytest.approx(by_hand(recurrent, [1, 1, 1, 3, 3, 3][:steps], tokens)),
        }
        for steps in (4, 6)
    }
    assert record(whole) == record(whole / "checkpoint-6") == expected[6]
    assert record(whole / "checkpoint-4") == expected[4]
    card = json.loads((whole / "loopwise.json").read_text())
    assert {name: card[name] for name in expected[6]} == expected[6]
    flops = expected[6]["flops"].expected
    assert f"6 steps, 1,536 tokens,\n{flops:.3g} training FLOPs" in (whole / "README.md").read_text()
    capsys.readouterr()
    run(["inspect", str(whole)])
    assert f"\nlast run: 6 steps, 1,536 tokens, {flops:.3g} FLOPs\n" in capsys.readouterr().out
    run(["inspect", str(recurrent)])
    assert "last run" not in capsys.readouterr().out

    for name in ("resumed", "uncounted"):
        out = shutil.copytree(whole, tmp_path / name)
        shutil.rmtree(out / "checkpoint-6")
        (out / "config.json").unlink()
        state = out / "checkpoint-4" / "trainer_state.json"
        if name == "uncounted":
            fields = json.loads(state.read_text())
            fields["num_input_tokens_seen"] = 0
            state.write_text(json.dumps(fields))
            sums = out / "checkpoint-4" / "run.json"
            facts = json.loads(sums.read_text())
            facts["files"]["trainer_state.json"] = [state.stat().st_size, checksum(state)]
            del facts["spent"]
            sums.write_text(json.dumps(facts))
        assert main(command(recurrent, out, *settings, "--resume")) == 0
        assert "from checkpoint-4" in capsys.readouterr().out
        assert record(out) == expected[6]


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_token_costs_what_inspect_says(arch):
    """Experts count as far as a token uses them. Norms outside of the layers are all that `inspect` leaves out."""
    keys = {"prelude": [0], "core": [1, 2], "coda": [3, 4, 5], "num_recurrences": 2, "injection": "linear"}
    model = RecurrentDepthForCausalLM(RecurrentDepthConfig(source_config=source_config(arch), **keys))
    costs = parameter_costs(model)
    once, each, read = (cost.forward for cost in costs)
    for depth in (1, 4):
        inspected = flops_per_token(model.config, depth)
        assert inspected is not None
        assert 3 * inspected == pytest.approx(token_flops(costs, Depth(depth, None), None, 0, 0), rel=2e-3)
    for truncated in (Depth(3, 4), Depth(3, None)):  # no row carries gradient through more recurrences than it has
        assert token_flops(costs, truncated, None, 0, 0) == 6 * (once + read + 3 * each)
    assert token_flops(costs, Depth(3, 3), None, 0, 0, reads=2) == 6 * (once + 2 * read + 3 * each)


def test_depths_whose_logits_enter_the_loss_are_read_out(recurrent, command, tmp_path):
    """With `nested` a call ends at the last of them; coda and head run at each."""
    settings = ["steps=3", "recurrence.mean=4", "objectives.deep_supervision.segments=2"]
    run(command(recurrent, tmp_path / "out", *settings))
    once, each, read = (cost.forward for cost in parameter_costs(load_model(str(recurrent))))
    assert record(tmp_path / "out")["flops"] == 6 * (once + 2 * read + 4 * each) * 3 * 4 * 32


@pytest.mark.parametrize("stage", ["gate", "joint"])
def test_a_gate_alone_sends_no_gradient_through_the_model(stage):
    keys = {"prelude": [0], "core": [1, 2], "coda": [3], "num_recurrences": 3, "exit_gate": True}
    model: Any = RecurrentDepthForCausalLM(RecurrentDepthConfig(source_config=source_config("llama"), **keys))
    freeze(model, Optimiser(), Objectives.model_validate({"exit_gate": {"stage": stage}}), False)
    gate = sum(p.numel() for name, p in model.named_parameters() if name.startswith("exit_gate."))
    once, each, read = parameter_costs(model)
    if stage == "gate":
        assert (each.backward, read.backward, once.backward) == (0, 0, 2 * gate)
    else:
        assert all(cost.backward == 2 * cost.forward for cost in (once, each, read))
    assert once.forward > gate > 0


@pytest.mark.parametrize("relaxation", [None, {"rank": {"self_attn.q_proj": 2}, "depths": 3, "own": []}])
def test_frozen_parameters_cost_no_gradient_of_their_own(relaxation):
    """A frozen prelude is not even passed by gradients. The LoRA of a depth is counted where that depth runs."""
    keys = {"prelude": [0], "core": [1, 2], "coda": [3], "num_recurrences": 3, "relaxation": relaxation}
    model: Any = RecurrentDepthForCausalLM(RecurrentDepthConfig(source_config=source_config("llama"), **keys))
    sizes = {
        name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in ("prelude", "core", "coda")
    }
    lora = sum(p[0].numel() for name, p in model.named_parameters() if name.startswith("relaxation."))
    assert (lora > 0) is (relaxation is not None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("core.", "relaxation.")))
    norm = model.config.source_config.hidden_size
    head = model.get_output_embeddings().weight.numel()
    recurrent = sizes["core"] + lora + sum(p.numel() for p in model.injection.parameters()) / 3
    for depth in (1, 2):
        want = 2 * sizes["prelude"] + 4 * (sizes["coda"] + head) + 6 * depth * recurrent
        got = token_flops(parameter_costs(model), Depth(depth, None), None, 0, 0)
        assert got == pytest.approx(want, abs=8 * norm)
