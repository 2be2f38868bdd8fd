"""Sampling: a request's tokens depend on its seed alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loopwise.serve import Engine, Params
from tests.helpers.engines import build, requests


def test_seeds_of_any_size():
    engine = Engine(build(), max_num_seqs=2, max_model_len=60)
    seeds = (5, (1 << 64) + 5, 1 << 63, -(1 << 63))
    same, again, high, low = (
        engine.generate([[5, 6]], Params(9, temperature=1.0, seed=seed, ignore_eos=True))[0].tokens for seed in seeds
    )
    assert same == again
    assert high == low != same


@pytest.mark.parametrize("temperature", [1e-5, 1e-307, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest(temperature):
    engine = Engine(build(), max_num_seqs=2, max_model_len=60)
    greedy = Params(9, ignore_eos=True)
    assert engine.generate([[5, 6]], replace(greedy, temperature=temperature)) == engine.generate([[5, 6]], greedy)


def test_sampling_depends_on_the_seed_alone():
    prompts, params = requests(7, 8, "last-exited", ["latent-diff"])
    params = [replace(p, temperature=1.0, top_p=0.9, top_k=50, seed=n, max_tokens=12) for n, p in enumerate(params)]
    engine = Engine(build(), max_num_seqs=3, max_model_len=100, kv_policy="last-exited", passes_per_step=3)
    together = engine.generate(prompts, params)
    for n, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        assert engine.generate([prompt], p)[0] == together[n]
    again = engine.generate(prompts[:1], replace(params[0], seed=99))
    assert again[0].tokens != together[0].tokens
