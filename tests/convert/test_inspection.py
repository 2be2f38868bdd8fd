"""The output of `loopwise inspect`, against the model itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from loopwise.cli import main
from loopwise.convert import ConvertRecipe, convert
from loopwise.convert.inspection import flops_per_token, inspect, table
from loopwise.recipe import validate
from tests.helpers.tiny import VOCAB, save_source, tokenizer
from tests.helpers.train_tiny import save_recurrent


def test_counts_are_those_of_the_model_and_its_cache(capsys, tmp_path):
    save_source(tmp_path / "source")
    convert(
        tmp_path / "source", tmp_path / "model", validate(ConvertRecipe, {"sizes": [1, 2, 1], "num_recurrences": 3})
    )
    assert main(["inspect", str(tmp_path / "model"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert facts["parameters"]["unique"] == sum(p.numel() for p in model.parameters())
    core = sum(p.numel() for p in [*model.core.parameters(), *model.injection.parameters()])
    assert facts["parameters"]["effective"]["4"] == facts["parameters"]["unique"] + 3 * core
    cache = model(torch.ones(1, 5, dtype=torch.long), num_recurrences=3, use_cache=True).past_key_values
    held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None]
    kv = facts["kv_bytes_per_token"]
    assert kv["per-depth"]["3"] == kv["last-exited"]["3"] == sum(held) / 5
    assert kv["single"]["3"] == kv["first"]["3"] == kv["per-depth"]["1"]
    assert (kv["modulo-2"]["8"], kv["modulo-8"]["8"]) == (kv["per-depth"]["2"], kv["per-depth"]["8"])
    once = sum(p.numel() for p in [*model.prelude.parameters(), *model.coda.parameters()]) + VOCAB * 64
    assert facts["flops_per_token"]["2"] == flops_per_token(model.config, 2) == 2 * (once + 2 * core)
    assert flops_per_token(model.config, 2.5) == 2 * (once + 2.5 * core)
    assert flops_per_token(model.config, None) is None
    layers = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "source").model.layers.parameters())
    assert flops_per_token(model.config.source_config, None) == 2 * (layers + VOCAB * 64)
    assert main(["inspect", str(tmp_path / "model")]) == 0
    shown = capsys.readouterr().out
    assert "served up to 8" in shown
    assert "trained at no recurrences known" in shown
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    fields["trained_recurrences"] = {"mean": 4.5, "min": 1, "max": 16}
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    assert "trained at 1 to 16 recurrences (mean 4.5)" in table(inspect(tmp_path / "model"))
    assert main(["inspect", str(tmp_path / "source")]) == 2


@pytest.mark.parametrize("wrong", ["x", None, [1], {}, -1, float("nan"), pytest.param(10**400, id="huge")])
@pytest.mark.parametrize("name", ["steps", "tokens", "flops"])
def test_a_record_without_counts_has_none(name, wrong, capsys, tmp_path):
    save_recurrent(tmp_path / "model", tokenizer())
    counts = {"steps": 3, "tokens": 96, "flops": 1e9}
    for record, shown in ((counts, True), ({**counts, name: wrong}, False)):
        (tmp_path / "model" / "loopwise.json").write_text(json.dumps({"loopwise": "0.1.0", **record}))
        assert main(["inspect", str(tmp_path / "model")]) == 0
        last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("last run")]
        assert last == ["last run: 3 steps, 96 tokens, 1e+09 FLOPs"] * shown


@pytest.mark.parametrize(
    "effect",
    [
        5,
        {"num_recurrences": "8", "changes_nothing": None, "states": None},
        {"num_recurrences": 10**9, "changes_nothing": None, "states": None},
        {"num_recurrences": 8, "changes_nothing": "\x1b[2J", "states": None},
        {"num_recurrences": 8, "changes_nothing": None, "states": {"norm": [1.0]}},
        {"num_recurrences": 8, "changes_nothing": None, "states": {"norm": ["x"], "change": [], "growth": []}},
        {"num_recurrences": 8, "changes_nothing": None, "states": {"norm": [10**400], "change": [], "growth": []}},
    ],
)
def test_another_effect_of_the_recurrences_is_left_out(effect, capsys, tmp_path):
    save_recurrent(tmp_path / "model", tokenizer())
    (tmp_path / "model" / "loopwise.json").write_text(json.dumps({"loopwise": "0.1.0", "effect": effect}))
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "|s_r" not in capsys.readouterr().out


def test_a_router_and_a_lora_count(capsys, tmp_path):
    save_source(tmp_path / "source")
    sizes: dict[str, Any] = {}
    for name, more in {"plain": {"method": "recursive", "sharing": "middle-cycle"}, "mor": {"method": "mor"}}.items():
        for relaxed in ({}, {"lora": {"rank": 4, "targets": ["q"]}}):
            out = tmp_path / f"{name}{len(relaxed)}"
            convert(tmp_path / "source", out, validate(ConvertRecipe, {"loops": 2, **more, **relaxed}))
            assert main(["inspect", str(out), "--json"]) == 0
            sizes[out.name] = json.loads(capsys.readouterr().out)
    flops = {name: facts["flops_per_token"] for name, facts in sizes.items()}
    once = flops["plain0"]["2"] - flops["plain0"]["1"]
    assert flops["mor0"]["2"] - flops["mor0"]["1"] == once / 2  # the second recursion takes half of the tokens
    assert flops["plain1"]["2"] - flops["plain0"]["2"] == 2 * 2 * 2 * 4 * (64 + 64)  # two layers, twice; A and B
    kv = [sizes[name]["kv_bytes_per_token"] for name in ("plain0", "mor0")]
    assert list(kv[1]) == ["recursion-wise"]
    core = kv[0]["per-depth"]["2"] - kv[0]["per-depth"]["1"]
    assert kv[1]["recursion-wise"]["2"] == kv[0]["per-depth"]["1"] + core / 2
    assert main(["inspect", str(tmp_path / "mor0")]) == 0
    assert "expert-choice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model_type", "fields", "kv_policy"),
    [
        ("llama", {"tie_word_embeddings": True}, "modulo-3"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "per-depth"),
        ("mixtral", {}, "per-depth"),
        ("gpt_oss", {}, "per-depth"),
        ("granitemoe", {}, "per-depth"),
        ("falcon", {}, "per-depth"),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}, "per-depth"),
        ("gpt_bigcode", {}, "per-depth"),
    ],
)
def test_experts_and_shared_heads_count(model_type, fields, kv_policy, tmp_path):
    """Against the cache and the counted multiplications of the model itself."""
    keys: dict[str, Any] = {"sizes": [1, 2, 1], "num_recurrences": 3, "kv_policy": kv_policy}
    convert(save_source(tmp_path / "source", model_type, **fields), tmp_path / "out", validate(ConvertRecipe, keys))
    facts = inspect(tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    model.source.config._experts_implementation = "eager"  # multiplications that are counted
    with torch.no_grad():
        cache = model(torch.ones(1, 5, dtype=torch.long), num_recurrences=8, use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
        assert facts["kv_bytes_per_token"][kv_policy][8] == held / 5
        counted = {}
        for r in (1, 4):
            with FlopCounterMode(display=False) as counter:
                model(torch.ones(1, 1, dtype=torch.long), num_recurrences=r, use_cache=False)
            counted[r] = counter.get_total_flops()
    for r in (1, 4):  # norms, biases and attention to itself are the difference
        assert facts["flops_per_token"][r] == pytest.approx(counted[r], rel=0.04)
