"""Every launcher on two processes reaches the losses and weights of one process; the output of a dry run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from loopwise.cli import main
from loopwise.errors import UserError
from loopwise.recipe import RECIPES
from loopwise.train.curriculum import Depth
from loopwise.train.launch import check, remove_stale_locks
from loopwise.train.objectives import Objective
from loopwise.train.ranks import LAUNCHERS
from loopwise.train.recipe import Objectives, Train
from tests.helpers.train_tiny import RECURRENCE, history, launched, run, save_recurrent, weights

RELAXATION = {"depths": 3, "rank": {"self_attn.q_proj": 4, "mlp.down_proj": 3}, "own": ["input_layernorm.weight"]}
TIMES = {"scale": ["input_layernorm"], "gate": ["mlp.down_proj"]}
ROUTED: dict[str, Any] = {"injection": "none", "num_recurrences": 3}
MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    # LoRA of every depth, truncated backpropagation, a sampled R
    "relaxed": ({"relaxation": RELAXATION}, RECURRENCE),
    "expert": (
        {"router": {"kind": "expert", "depths": 3, "auxiliary": True}, **ROUTED},
        ["recurrence.mean=3", "objectives.router.auxiliary=0.01", "recurrence.capacity_warmup=0.5"],
    ),
    "token": (
        {"router": {"kind": "token", "depths": 3}, **ROUTED},
        ["recurrence.mean=3", "objectives.router.bias_step=0.01"],
    ),
    "gated": (
        {"exit_gate": True, "recurrence_norm": "between", "injection": "none"},
        ["recurrence.mean=3", "objectives.exit_gate.entropy=0.1"],
    ),
    "damped": ({"recurrence_damping": "learned", "recurrence_norm": "each"}, RECURRENCE),
    "selective": ({"injection": "none", "recurrence_damping": "selective"}, ["recurrence.mean=3"]),
    "decayed": ({"injection": "decayed", "state_init": "normal", "prelude_norm": True}, RECURRENCE),
    "conditioned": ({"injection": "none", "time_conditioning": TIMES}, ["recurrence.mean=3"]),
}
SETTINGS = ["steps=50", "log_every=1", "data.eval_fraction=0.1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            path = tmp_path_factory.mktemp("models") / kind
            made[kind] = save_recurrent(path, tokenizer, **MODELS[kind][0])
        return made[kind]

    return of


@pytest.fixture(scope="module")
def alone(models, command, tmp_path_factory):
    """A run in one process with two accumulated micro-batches, made once for each model."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("alone") / kind
            run(command(models(kind), made[kind], *SETTINGS, *MODELS[kind][1], "gradient_accumulation=2"))
        return made[kind]

    return of


def check_equal(out: Path, other: Path, moved_from: Path) -> None:
    assert len(history(out)) == len(history(other)) == 50
    assert history(out) == pytest.approx(history(other), abs=1e-4)
    held_out = [key for key in ("eval_loss_r1", "eval_loss_r3") if history(other, key)]
    assert held_out
    for key in held_out:
        assert history(out, key) == pytest.approx(history(other, key), abs=1e-4)
    found, expected, before = weights(out), weights(other), weights(moved_from)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        moved = (expected[name] - before[name]).abs().max().item()
        assert (x - expected[name]).abs().max().item() <= 0.02 * moved + 1e-6, name


FAST = {("fsdp2", "relaxed")}
MATRIX = [
    pytest.param(launcher, kind, marks=[] if (launcher, kind) in FAST else pytest.mark.slow)
    for launcher in LAUNCHERS
    for kind in MODELS
]


@pytest.mark.parametrize(("launcher", "kind"), MATRIX)
def test_two_processes_equal_one(launcher, kind, models, alone, command, tmp_path):
    arguments = command(models(kind), tmp_path / "two", *SETTINGS, *MODELS[kind][1])
    done = launched(arguments, launcher)
    assert done.returncode == 0, done.stderr
    check_equal(tmp_path / "two", alone(kind), models(kind))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_recurrences_of_records_with_shards(launcher):
    """Ranks whose micro-batches differ in R would not all gather the weights of a recurrence."""
    recurrences = {"field": "hops", "table": {1: 2, 2: 5}}
    recipe = Train.model_validate({"data": {"train": ["a.jsonl"], "recurrences": recurrences}, "steps": 1})
    check(launcher, recipe, 1)
    if launcher in ("fsdp2", "zero3"):
        with pytest.raises(UserError, match=f"data.recurrences: .* {launcher} gathers .*: use ddp, zero1 or zero2"):
            check(launcher, recipe, 2)
    else:
        check(launcher, recipe, 2)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["fsdp2", "ddp"])
def test_a_run_resumes_on_another_number_of_processes(launcher, models, alone, command, tmp_path):
    """Two processes up to step 25, then four, with half of their micro-batches."""
    out = tmp_path / "out"
    settings = [*SETTINGS, *MODELS["relaxed"][1], "save_every=25"]
    arguments = command(models("relaxed"), out, *settings)
    assert launched([*arguments, "batch_size=2", "gradient_accumulation=2"], launcher).returncode == 0
    for path in (out / "config.json", out / "model.safetensors", out / "checkpoint-50" / "run.json"):
        path.unlink()
    done = launched([*arguments, "batch_size=2", "--resume"], launcher, 4)
    assert done.returncode == 0, done.stderr
    assert "from checkpoint-25" in done.stdout
    check_equal(out, alone("relaxed"), models("relaxed"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["fsdp2", "zero1", "zero3"])
def test_sharded_checkpoints_resume_to_the_bit(launcher, models, command, tmp_path):
    settings = [*MODELS["relaxed"][1], "steps=20", "save_every=10"]
    arguments = command(models("relaxed"), tmp_path / "out", *settings)
    assert launched(arguments, launcher).returncode == 0
    expected = weights(tmp_path / "out")
    out = tmp_path / "out"
    for path in (out / "config.json", out / "model.safetensors", out / "checkpoint-20" / "run.json"):
        path.unlink()
    done = launched([*arguments, "--resume"], launcher)
    assert done.returncode == 0, done.stderr
    assert "from checkpoint-10" in done.stdout
    assert all(torch.equal(x, expected[name]) for name, x in weights(out).items())
    (out / "config.json").unlink()
    other = launched([*arguments, "--resume"], "ddp")
    assert other.returncode == 2
    assert f"checkpoint layout was '{launcher}" in other.stderr


def test_dry_run(recurrent, command, tmp_path, capsys):
    arguments = command(recurrent, tmp_path / "out", "recurrence.mean=4", "recurrence.backprop=2", "--dry-run")
    assert main([*arguments, "--launcher", "zero2", "--processes", "8"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("accelerate launch --config_file ")
    assert "zero2.yaml --num_processes 8" in shown[0]
    assert shown[0].endswith("--launcher zero2 --processes 8")
    assert "--dry-run" not in shown[0]
    assert "memory of each of 8 processes, micro-batches of 4 x 32 tokens, 4 recurrences:" in shown[1]
    assert [line.split()[0] for line in shown[2:]] == ["weights", "gradients", "optimiser", "activations", "in"]
    assert not (tmp_path / "out").exists()


def test_the_estimate_is_what_a_step_holds(recurrent, relaxed_estimates):
    found = relaxed_estimates
    parameters = sum(x.numel() for x in weights(recurrent).values())
    assert found["one"]["weights"] == found["one"]["gradients"] == 4 * parameters
    assert found["one"]["optimiser"] == 8 * parameters
    assert found["zero3"]["weights"] == -(-4 * parameters // 4)
    assert found["zero1"] == {**found["one"], "optimiser": 2 * parameters}
    # Truncated: only the recurrences with gradient count. Checkpointing by recurrence keeps less than by layer.
    assert found["deep"]["activations"] == pytest.approx(found["one"]["activations"], rel=0.02)
    assert found["whole"]["activations"] > 1.5 * found["one"]["activations"]
    assert found["recurrence"]["activations"] < found["layer"]["activations"] < found["whole"]["activations"]


@pytest.mark.parametrize(
    ("objectives", "calls"),
    [
        ({"exits": {}}, 1),
        ({"nested": 2}, 1),
        ({"deep_supervision": {"segments": 2}}, 1),
        ({"progressive": {"alpha": 0.5}}, 2),
        ({"progressive": {"alpha": 1}}, 1),
    ],
)
def test_the_estimate_of_several_depths_is_that_of_the_longest_draw(recurrent, objectives, calls):
    """Beside one call, or two, there are states to read out; their logits are made again and not kept."""
    from loopwise.train.estimate import estimate
    from loopwise.train.pretrained import load_config

    def activations(**keys) -> int:
        recipe = Train.model_validate({"data": {"train": ["-"], "sequence_length": 32}, "batch_size": 4, **keys})
        return estimate(load_config(str(recurrent), None), recipe, None, 1, Depth(6, None))["activations"]

    assert activations(objectives=objectives) == pytest.approx(calls * activations(), rel=0.1)


def measured(model: Any, num_recurrences: int, grad: int | None) -> int:
    sizes: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = torch.zeros(4, 32, dtype=torch.int64)
    inputs = {"input_ids": ids, "labels": ids, "sequence_ids": torch.zeros(4, dtype=torch.int64)}
    objective = Objective(Objectives(), model.config, None, 1, 0, 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = objective(model, inputs, 0, Depth(num_recurrences, grad), 1)
    loss.backward()
    return sum(sizes.values())


@pytest.fixture
def relaxed_estimates(recurrent):
    from loopwise.train.estimate import estimate
    from loopwise.train.pretrained import load_config, load_model

    def of(launcher, depth, **keys):
        recipe = Train.model_validate({"data": {"train": ["-"], "sequence_length": 32}, "batch_size": 4, **keys})
        return estimate(load_config(str(recurrent), None), recipe, launcher, 4, depth)

    found = {
        "one": of(None, Depth(4, 2)),
        "deep": of(None, Depth(16, 2)),
        "whole": of(None, Depth(16, None)),
        "layer": of(None, Depth(16, None), gradient_checkpointing="layer"),
        "recurrence": of(None, Depth(16, None), gradient_checkpointing="recurrence"),
        "zero1": of("zero1", Depth(4, 2)),
        "zero3": of("zero3", Depth(4, 2)),
    }
    # While it traces, transformers repeats the keys of grouped heads, which running attention does not keep.
    model = load_model(str(recurrent)).train()
    for name, real in {"one": measured(model, 4, 2), "whole": measured(model, 16, None)}.items():
        assert real <= found[name]["activations"] <= 1.1 * real
    return found


def test_muon_with_zero_is_refused(recurrent, command, tmp_path, capsys):
    arguments = command(recurrent, tmp_path / "out", "optimiser.kind=muon", "--launcher", "zero2", "--processes", "2")
    assert main(arguments) == 2
    assert "optimiser.kind=muon needs whole matrices, which zero2 flattens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_stale_build_locks_are_removed(tmp_path):
    for name, age in {"old": 1000, "new": 0}.items():
        folder = tmp_path / "py311_cpu" / name
        folder.mkdir(parents=True)
        for path in (folder / "lock", folder / "build.ninja"):
            path.write_text("")
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    assert remove_stale_locks(tmp_path) == [tmp_path / "py311_cpu" / "old" / "lock"]
    assert (tmp_path / "py311_cpu" / "new" / "lock").exists()


def test_every_launcher_has_a_profile():
    folder = RECIPES / "accelerate"
    assert sorted(path.stem for path in folder.glob("*.yaml")) == sorted(LAUNCHERS)
    for launcher in LAUNCHERS:
        kind = yaml.safe_load((folder / f"{launcher}.yaml").read_text())["distributed_type"]
        assert kind == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(launcher, "DEEPSPEED")
    script = folder / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_a_router_limits_the_recurrences(models, command, tmp_path, capsys):
    assert main(command(models("expert"), tmp_path / "out", "recurrence.mean=4")) == 2
    assert "up to 4 recurrences; this model's expert-choice router has at most 3" in capsys.readouterr().err
    assert main(command(models("token"), tmp_path / "out", "recurrence.mean=2")) == 2
    assert "token-choice router runs exactly 3" in capsys.readouterr().err


def test_the_bias_of_a_router_moves_towards_balance(models, alone):
    before, after = weights(models("token")), weights(alone("token"))
    assert not torch.equal(before["router.bias"], after["router.bias"])
    steps = (after["router.bias"] - before["router.bias"]) / 0.01
    assert torch.allclose(steps, steps.round(), atol=1e-3)


@pytest.mark.parametrize("kind", ["layer", "recurrence"])
def test_checkpointing_changes_nothing(kind, models, command, tmp_path):
    more = [*MODELS["relaxed"][1], "steps=6", "log_every=1", "batch_size=2"]
    run(command(models("relaxed"), tmp_path / "one", *more))
    run(command(models("relaxed"), tmp_path / "two", *more, f"gradient_checkpointing={kind}"))
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["relaxed", "gated"])
def test_compiled_layers_change_nothing(kind, models, command, tmp_path):
    more = [*MODELS[kind][1], "steps=6", "log_every=1"]
    run(command(models(kind), tmp_path / "one", *more))
    run(command(models(kind), tmp_path / "two", *more, "compile=layer"))
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), abs=1e-5)
