"""Tiny models, random requests, and the check of an engine against the oracle."""

from __future__ import annotations

import random
from typing import Any

import torch

from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.serve import Engine, Params
from loopwise.serve.engine.exits import RULES
from tests.helpers.oracle import Answer, Oracle
from tests.helpers.tiny import VOCAB, source_config

NEAR = 1e-4  # margin of an answer below which float error may decide
RELAXED = {"depths": 4, "rank": {"self_attn.q_proj": 8, "mlp.down_proj": 8}, "own": ["input_layernorm.weight"]}
DAMPED = {  # each kind of damping, with the steps that stand beside it
    "half steps": {"recurrence_damping": 0.5, "injection": "none", "recurrence_norm": "between"},
    "1/R": {"recurrence_damping": "1/R", "recurrence_norm": "last"},
    "learned": {"recurrence_damping": "learned", "recurrence_norm": "each"},
    "selective": {"recurrence_damping": "selective", "injection": "none", "exit_gate": True, "exit_gate_norm": "own"},
}
ROUTERS = {
    "expert": {"kind": "expert", "thresholds": [0.35, 0.5, 0.5], "alpha": 0.7},
    "expert, auxiliary": {"kind": "expert", "thresholds": [0.35, 0.5, 0.5], "auxiliary": True, "network": "mlp"},
    "expert, first": {"kind": "expert", "thresholds": [0.5, 0.5, 0.5], "alpha": 0.7, "kv": "first-recursion"},
    "expert, step": {"kind": "expert", "thresholds": [0.35, 0.5, 0.5], "update": "step", "alpha": 1.3},
    "token": {"kind": "token"},
    "token, step": {"kind": "token", "update": "step", "alpha": 1.5},
    "token, first": {"kind": "token", "kv": "first-recursion", "gate": "sigmoid", "network": "mlp"},
}


def build(model_type: str = "llama", source: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A tiny model with random weights, large enough that the state changes at every depth. source: fields of the
    source's config."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"prelude": [0], "core": [1, 2], "coda": [3], "num_recurrences": 4, "injection": "linear"}
    config = RecurrentDepthConfig(source_config=source_config(model_type, **(source or {})), **{**options, **fields})
    model = RecurrentDepthForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def build_routed(kind: str) -> Any:
    """A tiny model with a router of `ROUTERS`, whose choices vary from token to token."""
    model = build(num_recurrences=3, max_recurrences=3, injection="none", router=ROUTERS[kind])
    with torch.no_grad():
        for name, parameter in model.router.named_parameters():
            parameter *= 3 if "networks" in name or "auxiliary" in name else 1
    return model


def requests(
    seed: int, count: int, policy: str, rules: list[str], depth: int = 4
) -> tuple[list[list[int]], list[Params]]:
    """`count` prompts of mixed length, and params for each: a rule of `rules`, or forced depths, and random limits."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(draw.choice((1, 3, 9, 17, 30)))] for _ in range(count)]
    params = []
    for prompt in prompts:
        rule = draw.choice(rules)
        limit = draw.randint(1, depth)
        likely = {"latent-diff": 0.7, "cosine": 0.3, "entropy-diff": 0.1, "kl": 0.3, "minp-kl": 0.3, "gate": 0.6}
        likely |= {"argmax-stability": 1.0, "fixed": 0.0}
        threshold = likely.get(rule, RULES[rule].threshold) * draw.uniform(0.5, 1.5) or None
        forced = rule == "fixed" and draw.random() < 0.7
        params.append(
            Params(
                max_tokens=draw.randint(1, 20),
                num_recurrences=limit,
                min_recurrences=draw.randint(1, limit),
                exit_rule=rule,
                exit_threshold=1.0 if rule == "argmax-stability" else threshold,
                prompt_exit=policy != "per-depth" and RULES[rule].reads != "logits" and draw.random() < 0.5,
                trace=tuple(draw.randint(1, limit) for _ in range(len(prompt) + 20)) if forced else (),
                ignore_eos=True,
            )
        )
    return prompts, params


def check(model: Any, policy: str, prompts: list, params: list[Params], **options: Any) -> list[Answer]:
    """Compare the engine with the oracle: tokens and depths of every request are equal, near-ties aside.

    At most a tenth of the requests may be near-ties. Returns the oracle's answers.
    """
    oracle = Oracle(model, policy)
    want = [oracle.generate(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    engine = Engine(
        model,
        max_num_seqs=5,
        max_model_len=100,
        kv_policy=policy,
        passes_per_step=3,
        max_num_batched_tokens=40,
        **options,
    )
    got = engine.generate(prompts, params)
    clear = [n for n, answer in enumerate(want) if answer.margin > NEAR]
    assert len(clear) >= 0.9 * len(want)
    for n in clear:
        assert (got[n].tokens, got[n].depths) == (want[n].tokens, want[n].depths), (n, params[n])
    return want
