"""Mixture-of-Recursions from any source, from the authors' checkpoints, and with thresholds instead of their top-k."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loopwise.cli import main
from tests.helpers.convert import expected, import_refused, refused, run, source, tokens
from tests.helpers.tiny import ARCHITECTURES, keeping_more, named, save_source, tokenizer
from tests.helpers.tiny_configs import UNIFORM

ROUTING = {  # what their training configuration said
    "mor-expert": ["router.capacity=1,0.6667,0.3333"],
    "mor-expert-shared-kv": ["router.capacity=0.9,0.5", "router.alpha=0.7", "router.gate=tanh", "router.temperature=2"],
    "mor-token": [],
}
MIXED = {  # middle-cycle sharing of their tiny sources would tie layers of different attention types
    "afmoe", "cohere2", "cohere2_moe", "cohere_compass_text", "cwm", "dots1", "exaone4", "exaone_moe", "gemma2",
    "gemma3_text", "gemma4_text", "gemma4_unified_text", "gpt_oss", "granite_swa", "granitemoe_swa", "laguna",
    "llama4_text", "mellum", "mimo_v2_flash", "ministral", "olmo3", "smollm3", "vaultgemma",
}  # fmt: skip
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def imported(name: str, folder: Path) -> Any:
    assert main(["convert", str(source(name, folder / "source")), str(folder / "out"), *ROUTING[name]]) == 0
    return AutoModelForCausalLM.from_pretrained(folder / "out").eval()


@pytest.mark.parametrize("name", ROUTING)
def test_equals_the_authors_code(name, tmp_path):
    model, want = imported(name, tmp_path), expected(name)
    facts = json.loads((tmp_path / "out" / "loopwise.json").read_text())
    assert facts["format"] == ("token-choice MoR" if name == "mor-token" else "expert-choice MoR")
    assert facts["max_dlogit"] < 1e-4
    assert facts["parameters"]["source"] == facts["parameters"]["unique"]
    ids = want["ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want["logits"], rtol=0, atol=1e-4)
        torch.testing.assert_close(model(ids[:, :9]).logits, want["logits_9"], rtol=0, atol=1e-4)
        mask = torch.ones(2, 15, dtype=torch.long)  # the authors' code knows no padding
        mask[:, :3] = 0
        padded = model(torch.cat([ids.new_zeros(2, 3), ids], 1), attention_mask=mask).logits[:, 3:]
        torch.testing.assert_close(padded, want["logits"], rtol=0, atol=1e-4)
    if name == "mor-token":
        assert torch.equal(model.generate(ids, **GREEDY), model.generate(ids, use_cache=False, **GREEDY))
    else:
        with pytest.raises(ValueError, match="calibrate"):
            model.generate(ids, **GREEDY)


def test_what_the_checkpoint_says_is_kept(tmp_path):
    for name in ("mor-expert-shared-kv", "mor-expert"):
        (tmp_path / name).mkdir()
    shared = imported("mor-expert-shared-kv", tmp_path / "mor-expert-shared-kv").config
    own = imported("mor-expert", tmp_path / "mor-expert").config
    assert (shared.router["network"], shared.router["auxiliary"], shared.router["kv"]) == (
        "mlp",
        True,
        "first-recursion",
    )
    assert shared.relaxation is None
    assert own.relaxation["own"] == [f"self_attn.{c}_proj.weight" for c in "qkvo"]  # which their code did not tie
    assert (own.router["alpha"], own.router["inference"], own.source_config.num_hidden_layers) == (0.1, "topk", 8)


def test_what_the_tensors_deny_is_refused(capsys, tmp_path):
    folder, out = source("mor-expert", tmp_path / "source"), tmp_path / "out"
    assert "router.kind=token: by the checkpoint's tensors it is expert" in import_refused(
        capsys, folder, out, "router.kind=token"
    )
    assert "router.update=step: the checkpoint's authors" in import_refused(capsys, folder, out, "router.update=step")
    assert "leave out sizes" in import_refused(capsys, folder, out, "sizes=1,2,1")
    assert "router.capacity=[1.0, 0.5]: 3 numbers" in import_refused(capsys, folder, out, "router.capacity=1,0.5")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mor_router.router.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert "model.layers.2.mor_router.router.weight, and this one lacks it" in import_refused(capsys, folder, out)
    folder = source("mor-expert-shared-kv", tmp_path / "other")
    fields = json.loads((folder / "config.json").read_text())
    fields["kv_sharing"]["update_cache"] = True
    (folder / "config.json").write_text(json.dumps(fields))
    assert "kv_sharing.update_cache" in import_refused(capsys, folder, out)


@pytest.mark.parametrize("model_type", named({*ARCHITECTURES} - {*keeping_more()}, every=3))
def test_every_architecture(model_type, tmp_path):
    """Converted and verified; with thresholds the same with a cache, and a prefix's logits are those of the whole."""
    sharing = "cycle" if model_type in MIXED else "middle-cycle"
    router = {"alpha": 0.5, "capacity": [0.7, 0.4]}
    model = run(
        save_source(tmp_path / "source", model_type, **UNIFORM.get(model_type, {})),
        tmp_path / "out",
        method="mor",
        loops=2,
        sharing=sharing,
        router=router,
    )
    torch.nn.init.normal_(model.router.networks[0].weight, generator=torch.Generator().manual_seed(0))
    batch = tokens()
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        for r in (0, 1):  # thresholds that about half of the candidates pass
            routed = model(**batch, use_cache=False).router_outputs
            scores = routed.logits[..., r][routed.candidates[..., r]].sigmoid().sort().values
            half = len(scores) // 2
            model.config.router["thresholds"][r] = scores[half - 1 : half + 1].mean().item()
        want = model(**batch, use_cache=False)
        assert want.router_outputs.selected[seen].float().mean(0).tolist() == pytest.approx([0.5, 0.25], abs=0.05)
        torch.testing.assert_close(model(**batch).logits[seen], want.logits[seen], rtol=0, atol=5e-5)
        start = {name: tensor[:, :15] for name, tensor in batch.items()}
        torch.testing.assert_close(
            model(**start).logits[seen[:, :15]], want.logits[:, :15][seen[:, :15]], rtol=0, atol=5e-5
        )
    assert torch.equal(model.generate(**batch, **GREEDY), model.generate(**batch, use_cache=False, **GREEDY))


@pytest.mark.parametrize("model_type", named(keeping_more()))
def test_layers_that_keep_more_than_keys_and_values_have_no_router(model_type, capsys, tmp_path):
    """Nor do they share them between depths."""
    path = save_source(tmp_path / "source", model_type)
    for keys in (["method=mor", "loops=2", "sharing=cycle"], ["sizes=1,3,2", "kv_policy=single"]):
        line = refused(capsys, tmp_path, path, tmp_path / "out", *keys)
        assert "keep more than keys and values for each depth" in line or "parameters as layer" in line


def test_routers_are_a_function_of_the_seed(tmp_path):
    save_source(tmp_path / "source")
    routers = []
    for place, seed in enumerate((0, 0, 1)):
        keys: dict[str, Any] = {"method": "mor", "loops": 2, "router": {"kind": "token", "network": "mlp"}}
        state = run(tmp_path / "source", tmp_path / f"out{place}", seed=seed, **keys).state_dict()
        routers.append({name: tensor for name, tensor in state.items() if name.startswith("router.")})
    assert sorted(routers[0]) == ["router.bias", "router.networks.0.0.weight", "router.networks.0.2.weight"]
    assert all(torch.equal(routers[0][name], routers[1][name]) for name in routers[0])
    assert not torch.equal(routers[0]["router.networks.0.0.weight"], routers[2]["router.networks.0.0.weight"])
    assert routers[0]["router.networks.0.0.weight"].std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_calibrated_thresholds_take_the_capacities(auxiliary, tmp_path, capsys):
    router = {"inference": "topk", "capacity": [0.9, 0.5, 0.2], "auxiliary": auxiliary}
    save_source(tmp_path / "source", num_hidden_layers=8)
    run(tmp_path / "source", tmp_path / "out", method="mor", loops=3, router=router)
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\nthe cat sat on the mat, and what it saw there was 3.14159\n" * 40)
    assert main(["calibrate", str(tmp_path / "out"), str(text)]) == 0
    assert "router.inference=threshold" in capsys.readouterr().out
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.router["inference"] == "threshold"
    ids = torch.tensor(tokenizer()(text.read_text())["input_ids"])
    ids = ids[: len(ids) // 128 * 128].view(-1, 128)
    with torch.no_grad():
        shares = model(ids).router_outputs.selected.float().mean((0, 1))
    torch.testing.assert_close(shares, torch.tensor([0.9, 0.5, 0.2]), rtol=0, atol=0.01)
    batch = tokens()
    assert torch.equal(model.generate(**batch, **GREEDY), model.generate(**batch, use_cache=False, **GREEDY))


def test_what_cannot_be_calibrated_or_exported(capsys, tmp_path, monkeypatch):
    save_source(tmp_path / "source")
    run(tmp_path / "source", tmp_path / "token", method="mor", loops=2, router={"kind": "token"})
    run(tmp_path / "source", tmp_path / "expert", method="mor", loops=2)
    before = (tmp_path / "expert" / "config.json").read_text()
    (tmp_path / "short.txt").write_text("too short")
    for model, text, message in (
        ("token", "short.txt", "has no expert-choice router"),
        ("expert", "short.txt", "at least one block of 128 is needed"),
        ("expert", "none.txt", "none.txt: No such file or directory"),
        ("source", "short.txt", "not 'recurrent_depth'"),
    ):
        assert main(["calibrate", str(tmp_path / model), str(tmp_path / text)]) == 2
        line = capsys.readouterr().err
        assert message in line
        assert line.count("\n") == 1
    (tmp_path / "long.txt").write_text("the cat sat on the mat\n" * 100)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert main(["calibrate", str(tmp_path / "expert"), str(tmp_path / "long.txt")]) == 2
    assert capsys.readouterr().err.endswith("config.json: No space left on device\n")
    assert (tmp_path / "expert" / "config.json").read_text() == before
    assert not list((tmp_path / "expert").glob(".*"))
    assert main(["export", str(tmp_path / "expert"), str(tmp_path / "plain"), "--unroll", "2"]) == 2
    assert "has a router" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["router.capacity=1,1.5"], "router.capacity='1.5': Input should be less than or equal to 1"),
        (["router.capacity=1,0"], "router.capacity=0: Input should be greater than 0"),
        (["router.capacity=0.4,0.5"], "none is above the one before"),
        (["router.capacity=1,0.7,0.3"], "router.capacity=[1.0, 0.7, 0.3]: 2 numbers, one for each recurrence"),
        (["router.kind=token", "router.capacity=1,0.5"], "router.capacity is no field of a router of kind 'token'"),
        (["router.kind=both"], "router.kind='both': Input should be 'expert' or 'token'"),
        (["router.alpha=0"], "router.alpha=0: Input should be greater than 0"),
        (["router.update=step", "router.gate=tanh"], "router.update='step' with router.gate='tanh'"),
        (["router.capcity=1"], "did you mean 'router.capacity'"),
        (["sharing=sequence"], "it needs sharing='cycle'"),
        (["max_recurrences=8"], "max_recurrences equal to them"),
    ],
)
def test_bad_routers(keys, message, capsys, tmp_path):
    folder = save_source(tmp_path / "source")
    assert message in import_refused(capsys, folder, tmp_path / "out", "method=mor", "loops=2", *keys)


def test_loops_are_needed(capsys, tmp_path):
    folder = save_source(tmp_path / "source")
    assert "method=mor needs loops=B" in import_refused(capsys, folder, tmp_path / "out", "method=mor")
