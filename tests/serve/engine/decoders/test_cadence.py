"""The cadence that the engine chooses: the best by a simulation of waves, and the same text."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from loopwise.serve import Engine, Params
from loopwise.serve.engine.costs import Costs
from loopwise.serve.engine.decoders.cadence import rate
from tests.helpers.engines import build, requests
from tests.helpers.graph_ticks import recorder
from tests.helpers.waves import agreeing

AUTO: dict[str, Any] = {"decoder": "wave", "max_in_flight": "auto", "draft_every": "auto"}


def simulated(every: int, depth: int, settled: list[int], width: int) -> float:
    """Passes a token of one wave whose positions settle after `settled` recurrences, one pass at a time."""
    start, done = [0], []
    for t in settled:
        done.append(max(start[-1] + depth, done[-1] if done else 0))
        free = done[-width] if len(done) >= width else 0
        start.append(max(start[-1] + min(every * -(-t // every), depth), free))
    return done[-1] / len(settled)


@pytest.mark.parametrize("depth", [4, 8, 32])
@pytest.mark.parametrize("width", [2, 8, 32])
def test_passes_of_a_token_are_those_of_a_simulation(depth, width):
    draw = random.Random(depth + width)
    settled = [min(1 + int(draw.expovariate(0.4)), depth) for _ in range(1000)]
    counts = [float(settled.count(t)) for t in range(depth + 1)]
    for every in range(1, depth + 1):
        found = 1 / rate(every, depth, counts, width, 1, 0, Costs({1: 1.0}, {1: 0.0}), 0)
        wide = min(width, -(-depth // every))
        assert found == pytest.approx(simulated(every, depth, settled, wide), rel=0.2)


def test_dear_lanes_and_read_outs_make_drafts_rare():
    def best(settled: list[float], costs: Costs, plain: int = 0, budget: int = 0) -> int:
        return max(range(1, 9), key=lambda every: rate(every, 8, settled, 8, 1, plain, costs, budget))

    flat, dear, none = {1: 1.0, 64: 1.0}, {1: 1.0, 64: 64.0}, {1: 0.0, 64: 0.0}
    mixed = [0.0, 5.0, 3.0, *[0.0] * 5, 1.0]
    right_at = [[9.0 * (depth == t) for depth in range(9)] for t in range(9)]
    assert best(right_at[1], Costs(flat, flat)) == 1
    assert best(right_at[3], Costs(flat, flat)) == 3
    assert best(right_at[8], Costs(flat, flat)) == 8  # plain decoding
    assert best(mixed, Costs(flat, none)) == 1
    assert best(mixed, Costs(flat, {1: 16.0, 64: 16.0})) == 4
    assert best(mixed, Costs(dear, none), plain=32) == 8
    assert best(mixed, Costs(flat, none), plain=32, budget=33) == 1  # no lane is left for drafts: all are plain


@pytest.mark.parametrize("right", [True, False])
def test_an_engine_finds_it(right):
    """Where drafts are right, it stays at K = 1; where they are wrong, it reads out few or none, but for its probes."""
    model = agreeing(8) if right else build(num_recurrences=8, max_recurrences=8)
    engine = Engine(model, max_num_seqs=1, max_model_len=128, max_in_flight="auto", passes_per_step=8)
    plain = Params(96, 8, ignore_eos=True)
    (want,) = engine.generate([[5, 6, 7]], plain)
    engine.loop.counts.reads.clear()
    (done,) = engine.generate([[5, 6, 7]], replace(plain, **AUTO))
    assert (done.tokens, done.depths) == (want.tokens, want.depths)
    assert (engine.loop.cadence.best == 1) == right
    assert done.passes <= (120 if right else want.passes)
    (fixed,) = engine.generate([[5, 6, 7]], replace(plain, **{**AUTO, "draft_every": 1}))
    assert done.items <= fixed.items


@pytest.mark.parametrize("beside", [{"draft_every": 4}, {"draft_depths": (3,)}], ids=str)
def test_waves_with_a_cadence_of_their_own_teach_it_nothing(beside):
    """It learns from those alone whose cadence it chooses: others see no depth between their drafts."""
    fixed = replace(Params(60, 8, ignore_eos=True), **{**AUTO, "draft_every": None, **beside})
    engine = Engine(agreeing(8), max_num_seqs=3, max_model_len=128, max_in_flight="auto", passes_per_step=8)
    engine.generate([[5, 6, 7], [8]], [fixed, fixed])
    auto = replace(Params(30, 8, ignore_eos=True), **AUTO)
    engine.generate([[5, 6, 7], [8], [9]], [auto, fixed, fixed])
    found = engine.loop.cadence.settled
    assert sum(found[:2]) == sum(found) > 10  # every draft is right at once


def test_a_probe_counts_the_passes_that_ran():
    """A step may end before its passes are over, as others wait for its end."""
    engine = Engine(build(), max_num_seqs=1, max_model_len=128, max_in_flight=4, passes_per_step=64)
    engine.loop.somebody_waits = lambda: True
    seen: list[int] = []
    step = engine.loop.step
    engine.loop.step = lambda live: (step(live), seen.append(engine.loop.cadence.passes))[0]
    engine.generate([[5, 6, 7]], replace(Params(20, 4, ignore_eos=True), **{**AUTO, "max_in_flight": 4}))
    assert max(after - before for before, after in pairwise(seen)) <= 4


def test_a_probe_counts_no_passes_of_a_graph_tick_that_did_not_run():
    engine = Engine(build(), max_num_seqs=1, max_model_len=128, max_in_flight=4, passes_per_step=500, cuda_graphs=False)
    with torch.inference_mode():
        engine._record(recorder())
    wave = replace(Params(6, 4, ignore_eos=True), **{**AUTO, "max_in_flight": 4})
    engine.generate([[5, 6, 7]] * 2, wave)
    first = engine.loop.schedule.passes
    engine.generate([[5, 6, 7]], wave)
    assert first <= engine.loop.cadence.passes <= first + 30


def test_measured_costs_are_those_of_the_cadence():
    """The cadence has them whether exits wait by them or not."""
    engine = Engine(build(), max_num_seqs=2, max_in_flight="auto", budget="auto")
    assert engine.loop.schedule.costs is None
    assert engine.loop.cadence.work.costs is engine.loop.work.costs
    assert engine.loop.work.costs is not None


@pytest.mark.parametrize("policy", ["per-depth", "last-exited"])
def test_the_text_is_that_of_plain_decoding(policy):
    prompts, params = requests(51, 5, policy, ["fixed", "latent-diff"])
    params = [replace(p, max_tokens=40, num_recurrences=4, trace=(), seed=n) for n, p in enumerate(params)]
    params = [replace(p, temperature=float(n % 2)) for n, p in enumerate(params)]
    waves = [replace(p, **AUTO) if n % 4 else p for n, p in enumerate(params)]
    sizes: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 100, "kv_policy": policy, "passes_per_step": 2}
    want = Engine(build(), **sizes).generate(prompts, params)
    engine = Engine(build(), max_in_flight="auto", **sizes)
    seen: set[int] = set()
    step = engine.loop.step
    engine.loop.step = lambda live: (step(live), seen.add(engine.loop.cadence.every))[0]
    got = engine.generate(prompts, waves)
    assert [(c.tokens, c.depths) for c in got] == [(c.tokens, c.depths) for c in want]
    assert len(seen) > 1  # K has changed while they ran
