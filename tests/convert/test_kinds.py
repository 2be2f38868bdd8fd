"""Each kind of source from a checkpoint of transformers: converted, trained three steps, exported, generated from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loopwise.convert.export import export
from tests.helpers.convert import EVERY_LAYER, run, tokens
from tests.helpers.tiny import named, save_source
from tests.helpers.tiny_configs import SLOW

QUICK = ["deepseek_v3", "gemma4_text", "lfm2", "qwen3_5_text"]


@pytest.mark.parametrize("model_type", named([*QUICK, *SLOW]))
def test_the_whole_way(model_type, tmp_path):
    save_source(tmp_path / "source", model_type)
    model = run(tmp_path / "source", tmp_path / "out", **EVERY_LAYER).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(3):
        loss = model(**tokens(), labels=tokens()["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    for part in ("prelude", "core", "coda"):
        assert any(name.startswith(part) and not torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.eval().save_pretrained(tmp_path / "trained")
    differences = export(tmp_path / "trained", tmp_path / "plain", unroll=2)
    assert differences
    assert min(differences.values()) == 0  # where rounding depends on the batch of experts, in float64
    assert max(differences.values()) < 1e-6
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert plain.config.model_type == model_type
    with torch.no_grad():
        batch = tokens(padded=False)
        want = model(**batch, num_recurrences=2, use_cache=False).logits
        torch.testing.assert_close(plain(**batch, use_cache=False).logits, want, rtol=0, atol=1e-5)
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    assert torch.equal(plain.generate(**batch, **greedy), model.generate(**batch, num_recurrences=2, **greedy))
