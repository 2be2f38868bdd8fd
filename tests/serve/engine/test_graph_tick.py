"""Graph ticks, of a fixed width, on the CPU: without CUDA."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from loopwise.serve import Engine, Params
from loopwise.serve.engine.costs import Costs
from tests.helpers.engines import build, requests
from tests.helpers.graph_ticks import MODELS, compare_ticks, recorder, runs_of

GATED = {"prelude": [], "core": [0, 1, 2], "coda": [], "injection": "none", "exit_gate": True}
KINDS = {**MODELS, "gated": GATED}
POLICIES = ("per-depth", "last-exited", "single", "first", "modulo-2")


def cases() -> list[Any]:
    """Every kind under every policy, each with few lanes as well. Fast are two kinds a policy, one of them so."""
    few = {"max_lanes": 2, "coda_wait": 2, "max_in_flight": 3}
    return [
        pytest.param(policy, kind, options, marks=[] if (place - number) % 5 == bool(options) else pytest.mark.slow)
        for number, policy in enumerate(POLICIES)
        for place, kind in enumerate(KINDS)
        for options in ({}, few)
    ]


@pytest.mark.parametrize(("policy", "kind", "options"), cases())
def test_policies_and_exit_rules(policy, kind, options: dict[str, Any]):
    if policy == "per-depth" and options:
        options = {"max_lanes": 8, "max_in_flight": 3}  # all depths of a request
    rules = ["fixed", "latent-diff", "cosine", *(["gate"] if kind == "gated" else [])]
    prompts, params = requests(31, 14, policy, rules)
    compare_ticks(lambda: build(**KINDS[kind]), prompts, params, kv_policy=policy, **options)


def test_sampling_stop_tokens_and_rules_that_read_logits():
    """Requests that graph ticks cannot run take eager ticks; graph ticks run again after them."""
    prompts, params = requests(32, 16, "last-exited", ["fixed", "latent-diff"])
    for n, p in enumerate(params):
        params[n] = replace(p, temperature=n % 3 / 2, top_k=n % 5, top_p=0.9, seed=n, stop_token_ids=tuple(range(9)))
    params[9] = replace(params[9], exit_rule="kl", exit_threshold=0.3, prompt_exit=False, trace=(), max_tokens=6)
    compare_ticks(build, prompts, params, max_in_flight=3, kv_policy="last-exited")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["per-depth", "last-exited"])
def test_compiled(policy):
    prompts, params = requests(33, 10, policy, ["fixed", "latent-diff"])
    compare_ticks(build, prompts, params, kv_policy=policy, compile=True)


@pytest.mark.parametrize("width", [0, 3])
def test_read_outs_wait_by_the_costs(width):
    costs = Costs({1: 1.0, 16: 1.0}, {1: 3.0, 16: 3.0})
    draw = random.Random(34)
    prompts = [[draw.randrange(3, 50) for _ in range(5)] for _ in range(12)]
    params = [Params(12, 4, ignore_eos=True, trace=(4,) * 5 + tuple(draw.choices(range(1, 5), k=12))) for _ in prompts]
    engine = compare_ticks(build, prompts, params, costs, max_num_seqs=6, max_lanes=width, kv_policy="last-exited")
    reads = sum(engine.loop.counts.reads.values())
    assert reads < 0.7 * sum(engine.loop.counts.passes.values())


def recorded(**options: Any) -> Engine:
    """An engine with graph ticks."""
    engine = Engine(build(), cuda_graphs=False, **{"kv_policy": "last-exited", **options})
    with torch.inference_mode():
        engine._record(recorder())
    return engine


def test_full_depth_reads_out_once_a_token():
    """No pass or read-out is wasted. Those without lanes, which start before the host knows that the last request has
    ended, count for nothing; nor do the rows that pad the others."""
    engine = recorded(max_num_seqs=3, max_model_len=60, passes_per_step=100)
    engine.generate([[5, 6, 7]] * 3, Params(21, 4, ignore_eos=True))
    counts = engine.loop.counts
    assert counts.passes == {9: 4, 3: 80}
    assert counts.reads == {9: 1, 3: 20}


@pytest.mark.parametrize("policy", ["per-depth", "last-exited"])
def test_full_depth_costs_no_more_where_a_trace_asks_for_it(policy):
    """As of a request that goes on after a preemption. A trace of smaller depths needs more rows, or more read-outs."""
    found = []
    for trace in ((), (4,) * 24, (4,) * 6 + (1,) * 18):
        engine = recorded(max_num_seqs=3, max_model_len=60, passes_per_step=100, kv_policy=policy)
        runs = runs_of(engine)
        engine.generate([[5, 6, 7]] * 3, Params(21, 4, ignore_eos=True, trace=trace))
        found.append(runs)
    assert found[0] == found[1]
    assert found[0]["read", 4] == 20
    assert 80 <= found[0]["pass", 4] <= 82  # some start before the host knows that no request is left
    assert len(found[0]) == 2
    assert found[2] != found[0]


@pytest.mark.parametrize("policy", ["per-depth", "last-exited"])
def test_one_recurrence_trails_nothing(policy):
    engine = recorded(max_num_seqs=3, max_model_len=60, passes_per_step=100, kv_policy=policy)
    runs = runs_of(engine)
    engine.generate([[5, 6, 7]] * 3, Params(21, 1, ignore_eos=True))
    assert {rows for _, rows in runs} == {4}


def test_costs_are_measured_by_graphs_however_few_tokens_a_step_holds():
    engine = recorded(max_num_seqs=8, max_model_len=60, passes_per_step=1)
    costs = engine.loop.measure()
    assert set(costs.passes) == set(costs.reads) == {1, 2, 3, 4, 6, 8}
    assert not engine.loop.state.requests.count.any()


def test_a_step_ends_with_a_request_whose_row_others_wait_for():
    engine = recorded(max_num_seqs=2, max_model_len=80, passes_per_step=64)
    steps: list[int] = []
    step = engine.loop.step
    engine.loop.step = lambda live: (step(live), steps.append(sum(engine.loop.counts.passes.values())))[0]
    params = [Params(tokens, 4, ignore_eos=True) for tokens in (4, 15, 6)]
    done = engine.generate([[5, 6, 7]] * 3, params)
    assert [len(one.tokens) for one in done] == [4, 15, 6]
    assert steps[0] < 20  # of 64, as the third request waits


def test_exits_wait_no_longer_over_several_steps_than_in_one():
    """Passes have at most the width that was set."""
    engine = recorded(max_num_seqs=5, max_model_len=80, passes_per_step=1, max_lanes=3, coda_wait=2)
    trace = [(4,) * 3 + (depth,) * 9 for depth in (1, 4, 4, 4, 4)]
    done = engine.generate([[5, 6, 7]] * 5, [Params(9, 4, ignore_eos=True, trace=one) for one in trace])
    assert max(n for n in engine.loop.counts.passes if n < 9) == 3
    assert done[0].passes == 8
    assert sum(engine.loop.counts.passes.values()) < 80
