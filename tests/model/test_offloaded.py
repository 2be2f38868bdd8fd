"""Parts that `device_map` offloads compute what they compute in memory: each reads its parameters in its forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.model import GREEDY, build, build_relaxed, ids

MATRICES = ["input_layernorm.weight", "self_attn.q_proj.weight", "mlp.down_proj.weight"]
BESIDE = {"depths": 2, "rank": {"attn.c_attn": 4}, "own": ["attn.c_attn.bias"], "dora": True}
MODELS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora with a bias beside it": {"model_type": "gpt2", "relaxation": BESIDE},
    "matrices": {"relaxation": {"depths": 2, "rank": {}, "own": MATRICES}},
    "ends": {"prelude_norm": True, "state_projection": True, "injection": "diagonal"},
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_offloaded_parts_change_nothing(name, tmp_path):
    model = (build if name == "ends" else build_relaxed)(**MODELS[name])
    model.save_pretrained(tmp_path)
    greedy: dict[str, Any] = {**GREEDY, "max_new_tokens": 3}
    want, text = model(ids()).logits, model.generate(ids(), **greedy)
    total = sum(parameter.nbytes for parameter in model.parameters())
    for share in (0.5, 0):  # of the parameters, in memory
        made: Any = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map="auto", max_memory={"cpu": int(total * share)}, offload_folder=str(tmp_path / "disk")
        )
        assert "disk" in made.hf_device_map.values()
        assert torch.equal(made(ids()).logits, want)
        assert torch.equal(made.generate(ids(), **greedy), text)
