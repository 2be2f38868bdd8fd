"""The decoder `diffusion`: tokens equal the oracle's, whatever else is in flight."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from loopwise.errors import UserError
from loopwise.serve import Engine, Params
from loopwise.serve.engine.diffusion_settings import DiffusionSettings
from tests.helpers.engines import DAMPED, NEAR, RELAXED, build
from tests.helpers.oracle import Oracle
from tests.helpers.tiny import VOCAB

REFINED = [
    DiffusionSettings(inner=2, threshold=0.3),
    DiffusionSettings(inner=3, headway=2, ema=0.0, threshold=0.2),
    DiffusionSettings(inner=2, freeze="acceleration", threshold=0.4),
    DiffusionSettings(inner=2, freeze="token-stability"),
    DiffusionSettings(inner=2, freeze="fixed", headway=2),
    DiffusionSettings(inner=4, threshold=0.3, continuous=True),
]


SHAPES = {
    "input": {"state_init": "input"},
    "normal": {"state_init": "normal", "state_std": 0.3},
    "relaxed": {"relaxation": {**RELAXED, "dora": False}, "recurrence_norm": "between"},
    "normed": {"relaxation": {**RELAXED, "dora": True}, "recurrence_norm": "each"},
    "damped": {**DAMPED["1/R"], "state_init": "zeros"},
}


def cases() -> list[Any]:
    """Every shape under every policy; fast is each under one of them."""
    policies = ("per-depth", "single", "modulo-2")
    return [
        pytest.param(policy, shape, marks=[] if number % 3 == place else pytest.mark.slow)
        for number, shape in enumerate(SHAPES)
        for place, policy in enumerate(policies)
    ]


@pytest.mark.parametrize(("policy", "shape"), cases())
def test_a_diffusion_equals_the_oracle_beside_other_requests(policy, shape):
    """Plain requests run beside the diffusions, in passes too narrow for all lanes."""
    model = build(**SHAPES[shape])
    with torch.no_grad():  # a contraction: states converge
        model.injection.weight[:, :64] *= 0.2
    draw = random.Random(11)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(draw.choice((1, 4, 9)))] for _ in range(7)]
    params = [
        Params(10, 8, ignore_eos=True, decoder="diffusion", diffusion=REFINED[n % len(REFINED)])
        for n in range(len(prompts))
    ]
    oracle = Oracle(model, policy)
    want = [oracle.diffuse(prompt, p, 6).tokens for prompt, p in zip(prompts, params, strict=True)]
    others = [replace(p, decoder="plain") for p in params]
    plain = [oracle.generate(prompt, p) for prompt, p in zip(prompts, others, strict=True)]
    assert any(tokens != answer.tokens for tokens, answer in zip(want, plain, strict=True))
    engine = Engine(
        model, max_num_seqs=5, max_model_len=100, kv_policy=policy, passes_per_step=3, max_in_flight=6, max_lanes=13
    )
    got = engine.generate(
        [p for p in prompts for _ in "ab"], [p for pair in zip(params, others, strict=True) for p in pair]
    )
    assert [c.tokens for c in got[::2]] == want
    assert [c.tokens for n, c in enumerate(got[1::2]) if plain[n].margin > NEAR] == [
        answer.tokens for answer in plain if answer.margin > NEAR
    ]


def test_a_step_has_room_for_all_tokens_that_a_diffusion_freezes():
    engine = Engine(build(), max_num_seqs=2, max_model_len=100, passes_per_step=3, max_in_flight=40, kv_policy="single")
    leap = DiffusionSettings(inner=1, headway=20, threshold=1e9)  # every position converges at once
    params = Params(60, 4, ignore_eos=True, decoder="diffusion", diffusion=leap)
    assert len(engine.generate([[5, 6, 7]], params)[0].tokens) == 60


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"freeze": "latent-dif"}, "choose from latent-diff"),
        ({"inner": 0}, "at least 1"),
        ({"ema": 1.5}, "from 0 to 1"),
    ],
)
def test_a_diffusion_that_makes_no_sense_is_refused(wrong, message):
    engine = Engine(build(), max_num_seqs=1, max_model_len=50, max_in_flight=4)
    with pytest.raises(UserError, match=message):
        engine.generate([[5]], Params(3, 4, decoder="diffusion", diffusion=DiffusionSettings(**wrong)))


def test_noise_of_a_diffusion_depends_on_its_seed_alone():
    model = build()
    base = Params(
        12, 8, ignore_eos=True, decoder="diffusion", diffusion=DiffusionSettings(inner=2, threshold=0.3, noise=0.5)
    )
    engine = Engine(model, max_num_seqs=3, max_model_len=100, kv_policy="single", passes_per_step=3, max_in_flight=6)
    params = [replace(base, diffusion=replace(base.diffusion, seed=n)) for n in range(4)]
    together = engine.generate([[5, 6, 7]] * 4, params)
    assert [engine.generate([[5, 6, 7]], p)[0].tokens for p in params] == [c.tokens for c in together]
    assert len({tuple(c.tokens) for c in together}) > 1


def test_a_request_that_overflows_leaves_nothing_to_others():
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "injection" in name:
                parameter.mul_(8)
    engine = Engine(model, max_num_seqs=1, max_model_len=100, max_in_flight=8, kv_policy="last-exited")
    prompt, plain = list(range(3, 40)), Params(24, num_recurrences=4, ignore_eos=True)
    want = engine.generate([prompt], plain)
    diverging = DiffusionSettings(inner=3, continuous=True, freeze="acceleration", threshold=0.3)
    engine.generate([[5, 6, 7]], Params(90, ignore_eos=True, decoder="diffusion", max_in_flight=4, diffusion=diverging))
    assert bool(engine.loop.state.requests.saw_nonfinite[0])
    assert engine.generate([prompt], plain) == want
    assert not bool(engine.loop.state.requests.saw_nonfinite[0])


def test_a_diffusion_ends_where_positions_do():
    engine = Engine(build(), max_num_seqs=1, max_model_len=20, max_in_flight=4, kv_policy="single")
    params = Params(60, 4, ignore_eos=True, decoder="diffusion", diffusion=DiffusionSettings(inner=2, threshold=0.3))
    assert len(engine.generate([[5, 6, 7]], params)[0].tokens) == 18
    assert torch.isfinite(engine.loop.state.lanes.s).all()
