"""Roles, groups, freezing, multipliers, Muon beside AdamW, adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopwise.cli import main
from loopwise.train import optimisers
from loopwise.train.optimisers import MuonAndAdamW, build, freeze, groups, roles
from loopwise.train.pretrained import load_model
from loopwise.train.recipe import Adapters, Objectives, Optimiser
from tests.helpers.train_tiny import RECURRENCE, history, run, same, save_recurrent, weights

RELAXED: dict[str, Any] = {
    "injection": "none",
    "relaxation": {"depths": 3, "rank": {"self_attn.q_proj": 4}, "own": ["input_layernorm.weight"]},
}


@pytest.fixture(scope="module")
def relaxed(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "relaxed"
    return save_recurrent(path, tokenizer, {"tie_word_embeddings": False}, **RELAXED)


def test_every_parameter_has_a_role(relaxed, recurrent, plain):
    found = roles(load_model(str(relaxed)))
    assert found["source.model.embed_tokens.weight"] == "embeddings"
    assert found["source.lm_head.weight"] == "head"
    assert found["source.model.norm.weight"] == "norms"
    assert found["prelude.0.mlp.up_proj.weight"] == "prelude"
    assert found["core.1.self_attn.q_proj.weight"] == "core"
    assert found["core.1.post_attention_layernorm.weight"] == "norms"
    assert found["coda.0.self_attn.o_proj.weight"] == "coda"
    assert {found[name] for name in found if name.startswith("relaxation.")} == {"lora"}
    assert found.keys() == dict(load_model(str(relaxed)).named_parameters()).keys()
    tied = roles(load_model(str(recurrent)))
    assert tied["injection.weight"] == "injection"
    assert "head" not in tied.values()
    assert set(roles(load_model(str(plain))).values()) == {"embeddings", "norms", "core"}


def test_groups(relaxed):
    model = load_model(str(relaxed))
    keys = Optimiser.model_validate({"kind": "muon", "weight_decay": 0.1, "multipliers": {"lora": 2, "core": 0.5}})
    names = {id(p): name for name, p in model.named_parameters()}
    found = [({names[id(p)] for p in g["params"]}, g) for g in groups(model, keys)]
    assert sum(len(part) for part, _ in found) == len(names)

    def group_of(name: str) -> tuple:
        (group,) = [g for part, g in found if name in part]
        return group["muon"], group["lr"], group["weight_decay"]

    assert group_of("prelude.0.mlp.up_proj.weight") == (True, 1e-3, 0.1)
    assert group_of("core.0.mlp.up_proj.weight") == (True, 5e-4, 0.1)
    assert group_of("source.model.embed_tokens.weight") == (False, 1e-4, 0.1)
    assert group_of("source.model.norm.weight") == (False, 1e-4, 0.0)
    assert group_of("relaxation.0.self_attn.q_proj.lora_A") == (False, 2e-4, 0.1)
    assert group_of("relaxation.0.input_layernorm.weight") == (False, 2e-4, 0.0)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_and_adamw_are_torchs_own(adjust, relaxed, monkeypatch):
    """Both optimisers on their own parameters, over three steps with changing learning rates, and after a reload."""
    monkeypatch.setattr(optimisers, "precision", lambda device: torch.bfloat16)
    keys = Optimiser.model_validate({"kind": "muon", "weight_decay": 0.1, "muon_adjust": adjust})
    one, two = load_model(str(relaxed)), load_model(str(relaxed))
    joint = build(one, keys)
    assert isinstance(joint, MuonAndAdamW)
    parts = groups(two, keys)
    muon = torch.optim.Muon([g for g in parts if g["muon"]], momentum=0.95, adjust_lr_fn=adjust)
    adamw = torch.optim.AdamW([g for g in parts if not g["muon"]], betas=(0.9, 0.95), fused=True)
    for step in range(3):
        for model in (one, two):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
        for optimiser in (joint, muon, adamw):
            for group in optimiser.param_groups:
                group["lr"] *= 0.7
            optimiser.step()
        state = joint.state_dict()
        joint = build(one, keys)
        joint.load_state_dict(state)
        for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
            assert torch.equal(a, b), name
    assert len(joint.state_dict()["state"]) == len(list(one.parameters()))


@pytest.mark.parametrize("shape", [(96, 40), (40, 96)])
def test_muon_computes_in_float32_on_a_cpu(shape):
    """Its step is torch's, but for the rounding of bfloat16; singular values end near 1."""
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    steps = []
    for kind in (optimisers.Muon, torch.optim.Muon):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = grad.clone()
        kind([parameter], lr=1.0, weight_decay=0.0).step()
        steps.append(parameter.detach() / max(1, shape[0] / shape[1]) ** 0.5)
    ours, theirs = steps
    exact = -optimisers.orthogonal(grad.double(), (3.4445, -4.775, 2.0315), 5, 1e-7)
    assert (ours - exact).abs().max() < 1e-5
    assert 1e-4 < (theirs - exact).abs().max() < 0.02
    assert (torch.linalg.svdvals(ours) - 1).abs().max() < 0.4


def test_freezing(relaxed):
    model = load_model(str(relaxed))
    freeze(model, Optimiser(train=["lora", "norms"]), Objectives(), False)
    by_role = roles(model)
    assert {by_role[name] for name, p in model.named_parameters() if p.requires_grad} == {"lora", "norms"}
    assert {by_role[name] for name, p in model.named_parameters() if not p.requires_grad} & {"lora", "norms"} == set()


def test_frozen_parameters_stay_and_others_move(relaxed, command, tmp_path):
    run(command(relaxed, tmp_path / "out", "steps=3", "optimiser.train=lora,norms", "recurrence.mean=3"))
    before, after = weights(relaxed), weights(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("relaxation.") or "norm" in name for name in moved)
    assert "relaxation.0.self_attn.q_proj.lora_B" in moved


def test_a_gate_that_nothing_reads_is_frozen(tokenizer, tmp_path, command):
    model = save_recurrent(tmp_path / "gated", tokenizer, exit_gate=True)
    run(command(model, tmp_path / "out", "steps=3"))
    before, after = weights(model), weights(tmp_path / "out")
    assert torch.equal(before["exit_gate.weight"], after["exit_gate.weight"])
    run(command(model, tmp_path / "two", "steps=3", "objectives.exit_gate.stage=gate", "recurrence.mean=3"))
    after = weights(tmp_path / "two")
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"exit_gate.weight", "exit_gate.bias"}


def test_learned_damping_is_trained_as_the_injection_is(tokenizer, tmp_path, command):
    """By AdamW and without decay, also where Muon trains the matrices; with truncated backpropagation and all exits."""
    path = save_recurrent(tmp_path / "damped", tokenizer, recurrence_damping="learned")
    model: Any = load_model(str(path))
    (group,) = [g for g in groups(model, Optimiser(kind="muon")) if any(p is model.damping.weight for p in g["params"])]
    assert (roles(model)["damping.weight"], group["muon"], group["weight_decay"]) == ("injection", False, 0.0)
    more = ["optimiser.kind=muon", "recurrence.mean=3", "recurrence.backprop=1", "objectives.exits.target=labels"]
    run(command(path, tmp_path / "out", "steps=3", *more, "gradient_checkpointing=true"))
    assert (weights(tmp_path / "out")["damping.weight"] != 0).all()


def test_learning_rate_multipliers_scale_the_first_step(recurrent, command, tmp_path):
    """AdamW's first step moves every weight by the learning rate, so the change shows the multiplier."""
    more = ["steps=1", "optimiser.warmup=0", "optimiser.weight_decay=0", "optimiser.clip=0"]
    run(command(recurrent, tmp_path / "one", *more))
    multipliers = "optimiser.multipliers={core: 0.25, norms: 0, embeddings: 0}"  # embeddings are the first group
    run(command(recurrent, tmp_path / "two", *more, multipliers))
    before, one, two = weights(recurrent), weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, factor in {"core.0.mlp.up_proj.weight": 0.25, "coda.0.mlp.up_proj.weight": 1.0}.items():
        change = (one[name] - before[name]) * factor
        assert torch.allclose(two[name] - before[name], change, atol=1e-7), name
    assert torch.equal(two["source.model.norm.weight"], before["source.model.norm.weight"])
    assert history(tmp_path / "two", "learning_rate") == history(tmp_path / "one", "learning_rate") == [3e-3]


def test_a_run_with_muon_resumes_to_the_bit(recurrent, command, tmp_path):
    settings = ["steps=6", "save_every=3", "optimiser.kind=muon", "optimiser.schedule=wsd", *RECURRENCE]
    run(command(recurrent, tmp_path / "whole", *settings))
    out = tmp_path / "whole"
    expected = weights(out)
    for path in (out / "config.json", out / "model.safetensors", out / "checkpoint-6" / "run.json"):
        path.unlink()  # as if it had been killed while checkpoint 6 was written
    run(command(recurrent, out, *settings, "--resume"))
    assert all(torch.equal(x, expected[name]) for name, x in weights(out).items())


ADAPTERS = ["adapters.rank=4", "adapters.alpha=8", "steps=6", "save_every=3", *RECURRENCE]


def test_adapters_are_merged_and_resume(recurrent, command, tmp_path):
    out = tmp_path / "out"
    run(command(recurrent, out, *ADAPTERS, "log_every=1", "data.eval_fraction=0.1"))
    before, after = weights(recurrent), weights(out)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "core.0.self_attn.q_proj.weight" in moved
    assert all(name.startswith(("prelude.", "core.", "coda.")) and "proj" in name for name in moved)
    for name in moved:
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-6) <= 4
    at_end = history(out, "eval_loss_r3")[-1]
    for path in (out / "config.json", out / "model.safetensors", out / "checkpoint-6" / "run.json"):
        path.unlink()
    run(command(recurrent, out, *ADAPTERS, "log_every=1", "data.eval_fraction=0.1", "--resume"))
    assert all(torch.equal(x, after[name]) for name, x in weights(out).items())
    assert history(out, "eval_loss_r3")[-1] == at_end
    # What was measured with adapters beside the weights holds for the merged ones.
    run(command(out, tmp_path / "again", "steps=1", "optimiser.learning_rate=1e-30", "data.eval_fraction=0.1"))
    assert history(tmp_path / "again", "eval_loss_r3")[-1] == pytest.approx(at_end, abs=1e-5)


def test_adapters_of_one_seed_start_alike(recurrent, command, tmp_path):
    """Whatever the process has drawn before."""
    outs = [tmp_path / name for name in ("first", "second", "other")]
    for n, out in enumerate(outs):
        torch.manual_seed(n)
        run(command(recurrent, out, *ADAPTERS[:2], "steps=1", f"seed={n // 2}"))
    assert same(outs[0], outs[1])
    assert not same(outs[0], outs[2])


def test_adapters_beside_relaxation(relaxed, command, tmp_path):
    run(command(relaxed, tmp_path / "out", *ADAPTERS[:2], "steps=2", "recurrence.mean=3", "optimiser.train=lora"))
    before, after = weights(relaxed), weights(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.partition(".")[0] for name in moved} == {"relaxation", "prelude", "core", "coda"}


REFUSED = {
    "optimiser.train=cores": "optimiser.train",
    "optimiser.train=router": "optimiser.train=router: this model has no router; it has coda, core",
    "optimiser.train=core,lora": "optimiser.train=core,lora: this model has no lora; it has",
    "optimiser.train=core,adapters": "this model has no adapters",
    'optimiser.multipliers={"lora":0.5}': "optimiser.multipliers.lora has no effect: the trained roles are coda, core",
    'optimiser.train=core optimiser.multipliers={"coda":0.5}': (
        "optimiser.multipliers.coda has no effect: the trained roles are core"
    ),
    "optimiser.kind=muon optimiser.train=norms": (
        "optimiser.kind=muon has no effect: no matrix of prelude, core, coda or injection is trained"
    ),
    "optimiser.kind=muon adapters.rank=2": (
        "optimiser.kind=muon has no effect: no matrix of prelude, core, coda or injection is trained"
    ),
    "optimiser.muon_learning_rate=0.1": "muon_learning_rate=0.1 has no effect: it belongs to optimiser.kind=muon",
    "optimiser.multipliers={corr:0.5}": "optimiser.multipliers",
    "adapters.targets=nowhere_proj": "no linear module of a layer has this name; choose from down_proj, gate_proj",
    "adapters.rank=0": "adapters.rank=0",
}


@pytest.mark.parametrize("settings", REFUSED)
def test_bad_optimisers(settings, recurrent, command, tmp_path, capsys):
    assert main(command(recurrent, tmp_path / "out", *settings.split())) == 2
    error = capsys.readouterr().err
    assert REFUSED[settings] in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_defaults_of_adapters():
    assert Adapters().model_dump() == {"rank": 8, "alpha": None, "dropout": 0.0, "targets": None}
