"""The engine's tokens and depths equal those of one request at a time, whatever else is in flight."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.serve import Engine, Params
from loopwise.serve.engine.exits import RULES
from tests.model import test_relaxation
from tests.serve.engine.oracle import Answer, Oracle
from tests.tiny import VOCAB, source_config

NEAR = 1e-4


def build(model_type: str = "llama", **fields: Any) -> Any:
    """A tiny model of random weights, with states that move enough at every depth."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"prelude": [0], "core": [1, 2], "coda": [3], "num_recurrences": 4, "injection": "linear"}
    config = RecurrentDepthConfig(source_config=source_config(model_type), **{**options, **fields})
    model = RecurrentDepthForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def requests(
    seed: int, count: int, policy: str, rules: list[str], depth: int = 4
) -> tuple[list[list[int]], list[Params]]:
    """Prompts of mixed length, and what is asked of each."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(draw.choice((1, 3, 9, 17, 30)))] for _ in range(count)]
    params = []
    for prompt in prompts:
        rule = draw.choice(rules)
        limit = draw.randint(1, depth)
        likely = {"latent-diff": 0.7, "cosine": 0.3, "entropy-diff": 0.1, "kl": 0.3, "minp-kl": 0.3, "gate": 0.6}
        threshold = {**likely, "argmax-stability": 1.0, "fixed": 0.0}[rule] * draw.uniform(0.5, 1.5)
        forced = rule == "fixed" and draw.random() < 0.7
        params.append(
            Params(
                max_tokens=draw.randint(1, 20),
                num_recurrences=limit,
                min_recurrences=draw.randint(1, limit),
                exit_rule=rule,
                exit_threshold=1.0 if rule == "argmax-stability" else threshold,
                prompt_exit=policy != "per-depth" and draw.random() < 0.5,
                trace=tuple(draw.randint(1, limit) for _ in range(len(prompt) + 20)) if forced else (),
                ignore_eos=True,
            )
        )
    return prompts, params


def check(model: Any, policy: str, prompts: list, params: list[Params], **options: Any) -> list[Answer]:
    """Every request that is no near-tie has the oracle's tokens and depths; most are none, and exits vary."""
    oracle = Oracle(model, policy)
    want = [oracle.generate(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    engine = Engine(model, rows=5, length=100, kv_policy=policy, ticks=3, prompt_lanes=40, **options)
    got = engine.generate(prompts, params)
    clear = [n for n, answer in enumerate(want) if answer.margin > NEAR]
    assert len(clear) >= 0.9 * len(want)
    for n in clear:
        assert (got[n].tokens, got[n].depths) == (want[n].tokens, want[n].depths), (n, params[n])
    return want


@pytest.mark.parametrize("policy", ["per-depth", "last-exited", "single", "first", "modulo-2"])
def test_every_policy_with_forced_depths_and_rules(policy):
    cheap = ["fixed", "latent-diff", "cosine"]
    want = check(build(), policy, *requests(1, 24, policy, cheap))
    assert {depth for answer in want for depth in answer.depths} == {1, 2, 3, 4}


@pytest.mark.parametrize("rule", [name for name in RULES if name not in ("fixed", "gate")])
def test_every_rule(rule):
    want = check(build(), "last-exited", *requests(2, 12, "last-exited", [rule]))
    assert len({depth for answer in want for depth in answer.depths}) > 1


@pytest.mark.parametrize("policy", ["per-depth", "last-exited"])
def test_the_exit_gate_with_the_norm_between_recurrences(policy):
    model = build(prelude=[], core=[0, 1, 2], coda=[], injection="none", recurrence_norm="between", exit_gate=True)
    want = check(model, policy, *requests(3, 12, policy, ["gate"]))
    assert len({depth for answer in want for depth in answer.depths}) > 1


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gemma3_text", {}),
        ("mistral", {}),
        ("gpt2", {}),
        ("gpt_neox", {"recurrence_norm": "each"}),
        ("olmo2", {"recurrence_norm": "last", "state_init": "normal", "state_std": 0.5}),
        ("qwen3_moe", {"injection": "add", "state_init": "zeros"}),
        ("gpt_oss", {"injection": "none"}),
    ],
)
def test_architectures(model_type, fields):
    check(build(model_type, **fields), "last-exited", *requests(4, 10, "last-exited", ["fixed", "latent-diff"]))


@pytest.mark.parametrize("model_type", list(test_relaxation.PARTS))
@pytest.mark.parametrize("dora", [False, True])
def test_relaxation_at_mixed_depths(model_type, dora):
    model = test_relaxation.build(model_type, depths=3, dora=dora, num_recurrences=4)
    model.get_output_embeddings().weight.data *= 8  # fewer near-ties
    check(model, "last-exited", *requests(8, 12, "last-exited", ["fixed", "latent-diff"]))


@pytest.mark.parametrize("options", [{"width": 8}, {"coda_batch": 4}, {"width": 8, "coda_batch": 3}])
@pytest.mark.parametrize("policy", ["per-depth", "last-exited"])
def test_limits_of_a_pass_change_nothing(policy, options):
    check(build(), policy, *requests(6, 16, policy, ["fixed", "latent-diff"]), **options)


def test_sampling_is_the_seeds_alone():
    prompts, params = requests(7, 8, "last-exited", ["latent-diff"])
    params = [replace(p, temperature=1.0, top_p=0.9, top_k=50, seed=n, max_tokens=12) for n, p in enumerate(params)]
    engine = Engine(build(), rows=3, length=100, kv_policy="last-exited", ticks=3)
    together = engine.generate(prompts, params)
    for n, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        assert engine.generate([prompt], p)[0] == together[n]
    again = engine.generate(prompts[:1], replace(params[0], seed=99))
    assert again[0].tokens != together[0].tokens
