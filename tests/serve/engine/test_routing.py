"""Mixture-of-recursions: a routed model in the engine."""

from __future__ import annotations

import pytest
import torch

from loopwise.serve import Engine, Params
from tests.helpers.engines import ROUTERS, build_routed, requests


@pytest.mark.parametrize("kind", list(ROUTERS))
def test_a_routed_model_equals_transformers_and_saves_work(kind):
    model = build_routed(kind)
    prompts, _ = requests(13, 8, "per-depth", ["fixed"])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    want = [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]
    engine = Engine(model, max_num_seqs=3, max_model_len=100, passes_per_step=3, max_num_batched_tokens=20)
    got = engine.generate(prompts, Params(12, ignore_eos=True))
    assert [c.tokens for c in got] == want
    depths = {depth for c in got for depth in c.depths}
    assert len(depths) > 1
    full = sum(len(prompt) + 11 for prompt in prompts) * 3
    assert sum(n * times for n, times in engine.loop.counts.passes.items()) < full
