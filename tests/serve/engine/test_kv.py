"""KV policies: tokens and depths equal those of the oracle, and of transformers' generate."""

from __future__ import annotations

import pytest
import torch

from loopwise.serve import Engine, Params
from tests.helpers.engines import build, check, requests


@pytest.mark.parametrize("policy", ["per-depth", "last-exited", "single", "first", "modulo-2"])
def test_every_policy_with_forced_depths_and_rules(policy):
    cheap = ["fixed", "latent-diff", "cosine"]
    want = check(build(), policy, *requests(1, 14, policy, cheap))
    assert {depth for answer in want for depth in answer.depths} == {1, 2, 3, 4}


@pytest.mark.parametrize("policy", ["last-exited", "single", "first", "modulo-2"])
def test_transformers_generate_follows_the_policy(policy):
    """The engine equals `generate` at full depth, with prompts of one chunk and left padding."""
    model = build(kv_policy=policy)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    prompts, _ = requests(12, 6, policy, ["fixed"])
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    want = model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()
    got = Engine(model, max_num_seqs=3, max_model_len=100).generate(prompts, Params(10, ignore_eos=True))
    assert [c.tokens for c in got] == want
