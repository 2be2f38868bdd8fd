"""The loop: limits of a pass, ends of a step, preemption."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from loopwise.serve import Engine, Params
from loopwise.serve.engine.loop import Prompt
from loopwise.serve.engine.tick import TickReport
from tests.helpers.engines import NEAR, build, check, requests
from tests.helpers.oracle import Oracle


@pytest.mark.parametrize("options", [{"max_lanes": 8}, {"coda_wait": 4}, {"max_lanes": 8, "coda_wait": 3}])
@pytest.mark.parametrize("policy", ["per-depth", "last-exited"])
def test_limits_of_a_pass_change_nothing(policy, options):
    check(build(), policy, *requests(6, 16, policy, ["fixed", "latent-diff"]), **options)


def test_a_request_for_no_tokens_gets_none():
    """A request for 0 tokens returns none beside running ones, also with a prompt longer than `prompt_lanes`."""
    engine = Engine(
        build(), max_num_seqs=3, max_model_len=60, passes_per_step=4, kv_policy="last-exited", max_num_batched_tokens=8
    )
    params = [Params(tokens, 4, ignore_eos=True) for tokens in (30, 0, 0)]
    got = engine.generate([[5, 6], [7] * 3, [5] * 30], params)
    assert [len(done.tokens) for done in got] == [30, 0, 0]


def counted_steps(engine: Engine) -> list[int]:
    """The passes of each step of `engine`, which the list gets from now on."""
    steps, tick = list[int](), engine.loop.tick

    def step(live: torch.Tensor) -> None:
        steps.append(0)
        type(engine.loop).step(engine.loop, live)

    def counted(max_passes: int) -> TickReport:
        report = tick(max_passes)
        steps[-1] += report.passes
        return report

    engine.loop.step, engine.loop.tick = step, counted
    return steps


@pytest.mark.parametrize("graph_tick", [False, True])
def test_a_step_ends_when_somebody_waits(graph_tick):
    """A step ends early for a waiting request, or with a request whose row is wanted. Tokens stay the same."""
    engine = Engine(
        build(), max_num_seqs=6, max_model_len=100, passes_per_step=40, kv_policy="last-exited", cuda_graphs=False
    )
    if graph_tick:
        with torch.inference_mode():
            engine._record(lambda run: run)
    prompts, params = requests(12, 6, "last-exited", ["fixed", "latent-diff"])
    params = [replace(p, max_tokens=12, num_recurrences=4, min_recurrences=2) for p in params]
    steps, draw = counted_steps(engine), random.Random(1)
    want = engine.generate(prompts, params)
    assert len(steps) <= 3
    engine.loop.somebody_waits = lambda: True
    assert engine.generate(prompts, params) == want
    assert len(steps) > 10
    assert max(steps[-9:]) <= 4  # a prompt's 4 passes run back to back
    steps.clear()
    engine.loop.somebody_waits = lambda: draw.random() < 0.5
    assert engine.generate(prompts, params) == want
    assert len(steps) > 4
    engine.loop.somebody_waits, params[0] = None, replace(params[0], max_tokens=2)
    steps.clear()
    engine.max_num_seqs, engine.loop.eager = 2, False
    short = engine.generate(prompts[:3], params[:3])  # the third waits for the row of the first
    assert short[1:] == want[1:3]
    assert steps[0] < 20


def test_a_step_ends_with_a_diffusion():
    """Its row is free at once for the request that waits."""
    engine = Engine(build(), max_num_seqs=2, max_model_len=100, passes_per_step=400, max_in_flight=4)
    diffusion = Params(3, 4, decoder="diffusion", max_in_flight=4, ignore_eos=True)
    params = [diffusion, Params(60, 4, ignore_eos=True), Params(2, 4, ignore_eos=True)]
    steps = counted_steps(engine)
    done = engine.generate([[5, 6], [7], [8]], params)
    assert [len(one.tokens) for one in done] == [3, 60, 2]
    assert steps[0] < 60


def test_time_conditioning_deeper_than_the_config():
    """A table has a row for each R and recurrence, up to the engine's greatest R."""
    times = {"scale": ["input_layernorm"], "gate": ["mlp.down_proj"]}
    model = build(injection="none", time_conditioning=times, max_recurrences=4)
    engine = Engine(copy.deepcopy(model), max_num_seqs=2, max_model_len=40, max_recurrences=7)
    (done,) = engine.generate([[5, 6, 7]], Params(8, 7, ignore_eos=True))
    model.config.max_recurrences = 7
    want = model.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=8, min_new_tokens=8, do_sample=False, num_recurrences=7
    )
    assert done.tokens == want[0, 3:].tolist()


@pytest.mark.parametrize("rule", ["entropy-diff", pytest.param("kl", marks=pytest.mark.slow)])
def test_a_preempted_request_continues_after_its_blocks_were_reused(rule):
    """A rule that reads through a coda needs the coda's keys of earlier positions, which resumption recomputes."""
    prompts, params = requests(11, 12, "last-exited", [rule])
    model = build(prelude=[0], core=[1], coda=[2, 3])
    some = {"max_tokens": 20, "num_recurrences": 4, "min_recurrences": 1, "ignore_eos": True}
    params, oracle = [replace(asked, **some) for asked in params], Oracle(model, "last-exited")
    wanted = [oracle.generate(prompt, asked) for prompt, asked in zip(prompts, params, strict=True)]
    engine = Engine(model, max_num_seqs=1, max_model_len=100, kv_policy="last-exited", passes_per_step=3)
    loop, row, preempted = engine.loop, torch.zeros(1, dtype=torch.long), 0
    caches: Any = vars(loop.forward.attention)["caches"]
    for prompt, asked, want in zip(prompts, params, wanted, strict=True):
        request, tokens = engine.request(asked), []
        if want.margin < NEAR:
            continue
        with torch.inference_mode():
            while len(tokens) < 20:
                loop.admit(0, replace(request, max_tokens=20 - len(tokens)))
                loop.prompt([Prompt(0, torch.tensor(prompt + tokens), 0, True, generated=len(prompt))])
                for _ in range(3):
                    loop.step(row)
                    tokens += loop.state.requests.tokens[0, : int(loop.state.requests.count[0])].tolist()
                request = replace(request, forced_depths=loop.release(0).tolist())
                for cache in (one for pair in caches for one in pair):
                    cache.normal_(std=4.0)
                preempted += 1
        assert tokens == want.tokens, (prompt, asked)
    assert preempted > 24
