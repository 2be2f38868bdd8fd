"""Damped recurrence in lanes of mixed depths and requests of mixed R: tokens and depths equal the oracle's."""

from __future__ import annotations

import pytest
import torch

from loopwise.serve import Engine, Params
from tests.helpers.engines import DAMPED, build, check, requests

RULES = ["fixed", "latent-diff"]


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("half steps", "per-depth"), ("1/R", "last-exited"), ("1/R", "per-depth"), ("learned", "single")],
)
def test_lanes_equal_the_oracle(kind, policy):
    check(build(**DAMPED[kind]), policy, *requests(6, 10, policy, RULES))


def test_a_selective_gate_and_an_exit_gate_with_its_own_norm():
    """As LoopUS has them."""
    check(build(**DAMPED["selective"]), "last-exited", *requests(9, 10, "last-exited", ["fixed", "gate"]))


@pytest.mark.parametrize("kind", DAMPED)
def test_full_depth_equals_generate(kind):
    """At a depth of each request's own; the batch does not share them."""
    model, prompts = build(**DAMPED[kind]), requests(7, 6, "per-depth", RULES)[0]
    depths = [1, 2, 3, 4, 4, 2]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    with torch.no_grad():
        want = [
            model.generate(torch.tensor([prompt]), num_recurrences=depth, **options)[0, len(prompt) :].tolist()
            for prompt, depth in zip(prompts, depths, strict=True)
        ]
    engine = Engine(model, max_num_seqs=4, max_model_len=60, passes_per_step=3)
    got = engine.generate(prompts, [Params(8, depth, ignore_eos=True) for depth in depths])
    assert [completion.tokens for completion in got] == want


@pytest.mark.slow
def test_compiled():
    check(build(**DAMPED["learned"]), "last-exited", *requests(8, 10, "last-exited", RULES), compile=True)
