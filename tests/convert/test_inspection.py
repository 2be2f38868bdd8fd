"""What `loopwise inspect` says, against the model itself."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from loopwise.cli import main
from loopwise.convert import ConvertRecipe, convert
from loopwise.recipe import validate
from tests.tiny import VOCAB, save_source


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
    assert facts["kv_bytes_per_token"]["3"] == sum(held) / 5
    once = sum(p.numel() for p in [*model.prelude.parameters(), *model.coda.parameters()]) + VOCAB * 64
    assert facts["flops_per_token"]["2"] == 2 * (once + 2 * core)
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "served up to 8" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "source")]) == 2
