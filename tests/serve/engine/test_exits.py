"""Exit rules: the depths that the oracle gives, for decoding and for prompts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from loopwise.errors import UserError
from loopwise.model.configuration_recurrent_depth import EXIT_RULES
from loopwise.serve import Engine, Params
from loopwise.serve.engine import exits
from loopwise.serve.engine.exits import RULES
from tests.helpers.engines import build, check, requests
from tests.helpers.tiny import VOCAB


def test_the_config_names_the_engines_rules():
    assert tuple(RULES) == EXIT_RULES


@pytest.mark.parametrize("rule", [name for name in RULES if name not in ("fixed", "gate")])
def test_every_rule(rule):
    want = check(build(), "last-exited", *requests(2, 12, "last-exited", [rule]))
    assert len({depth for answer in want for depth in answer.depths}) > 1


@pytest.mark.parametrize(("policy", "rules"), [("per-depth", ["kl", "minp-kl"]), ("last-exited", [*RULES][4:])])
def test_logits_of_many_lanes_are_read_in_chunks(policy, rules, monkeypatch):
    """The engine keeps one distribution a request, not one a lane; none where no rule compares distributions."""
    monkeypatch.setattr(exits, "CHUNK", 3)
    model = build(core=[1, 2, 3], coda=[])
    prompts, params = requests(5, 12, policy, rules)
    params = [replace(p, prompt_exit=policy != "per-depth") for p in params]
    check(model, policy, prompts, params)
    engine = Engine(model, max_num_seqs=12, max_model_len=100, kv_policy=policy)
    for rule in ("argmax-stability", "kl"):
        assert "log_p" not in vars(engine.loop.rules.by_logits)
        engine.generate(prompts, [replace(p, exit_rule=rule, exit_threshold=None, prompt_exit=False) for p in params])
    assert len(engine.loop.rules.by_logits.log_p) == 12


@pytest.mark.parametrize("policy", ["per-depth", "last-exited"])
def test_the_exit_gate_with_the_norm_between_recurrences(policy):
    model = build(prelude=[], core=[0, 1, 2], coda=[], injection="none", recurrence_norm="between", exit_gate=True)
    want = check(model, policy, *requests(3, 12, policy, ["gate"]))
    assert len({depth for answer in want for depth in answer.depths}) > 1


def test_prompts_that_exit_are_the_same_in_chunks():
    """With a coda, rules that read logits cannot end prompt positions: their logits depend on the chunks.

    Policies that overwrite slots run a prompt in one chunk.
    """
    draw = random.Random(0)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(60)] for _ in range(4)]
    for rule, threshold in (("latent-diff", 0.7), ("cosine", 0.3), ("kl", 0.3), ("argmax-stability", 1.0)):
        for coda in ([], [3]):

            def engine(policy: str, lanes: int, coda: list[int] = coda) -> Engine:
                model = build(coda=coda)
                return Engine(model, max_num_seqs=2, max_model_len=80, kv_policy=policy, max_num_batched_tokens=lanes)

            params = Params(6, 4, exit_rule=rule, exit_threshold=threshold, prompt_exit=True, ignore_eos=True)
            engines = [engine("last-exited", lanes) for lanes in (16, 200)]
            if coda and RULES[rule].reads == "logits":
                for one in engines:
                    with pytest.raises(UserError, match=f"{rule}.*choose from fixed, latent-diff, cosine, gate"):
                        one.generate(prompts, params)
                engine("single", 200).generate(prompts[:1], params)
                continue
            cut, whole = (one.generate(prompts, params) for one in engines)
            assert [(c.tokens, c.depths) for c in cut] == [(c.tokens, c.depths) for c in whole], (rule, coda)
