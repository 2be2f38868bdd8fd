"""A wave is exact: its tokens and depths are those of plain decoding, for any model, prompt, seed, width and budget."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwise.serve import Engine, Params
from loopwise.serve.engine.costs import Costs
from tests.helpers.tiny import VOCAB
from tests.serve.engine.test_engine import build

RULES = {"fixed": None, "latent-diff": 0.7, "cosine": 0.3, "kl": 0.3, "argmax-stability": 1.0}
SHAPES: list[dict[str, Any]] = [
    {},
    {"prelude": [], "core": [0, 2], "coda": [], "injection": "none"},
    {"prelude": [], "core": [0, 1, 2], "coda": [3], "injection": "add", "recurrence_norm": "each"},
    {"prelude": [0, 1], "core": [3], "coda": [2], "recurrence_norm": "last", "state_init": "normal", "state_std": 0.5},
]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from(["llama", "qwen3", "olmo2", "gemma3_text"]), st.sampled_from(SHAPES))
def test_a_wave_is_plain_decoding(seed, model_type, shape):
    draw = random.Random(seed)
    policy = draw.choice(["per-depth", "last-exited"])
    prompts, params = [], []
    for _ in range(6):
        prompts.append([draw.randrange(3, VOCAB) for _ in range(draw.choice((1, 4, 17)))])
        rule = draw.choice(list(RULES))
        limit = draw.randint(1, 6)
        more = {"temperature": draw.choice((0.0, 0.7, 1.5)), "top_k": draw.choice((0, 9)), "seed": draw.randrange(99)}
        least = draw.randint(1, limit)
        params.append(Params(draw.randint(1, 16), limit, least, rule, RULES[rule], ignore_eos=True, **more))
    waves = [replace(p, decoder="wave", wave=draw.randint(2, 7)) for p in params]
    rows, ticks = draw.randint(1, 6), draw.randint(1, 9)
    plain = Engine(build(model_type, **shape), rows=4, length=64, kv_policy=policy).generate(prompts, params)
    engine = Engine(build(model_type, **shape), rows=rows, length=64, kv_policy=policy, ticks=ticks, wave=7)
    engine.loop.eager_tick.budget = draw.choice((0, 1, rows, 2 * rows + 1))
    got = engine.generate(prompts, waves)
    assert [(c.tokens, c.depths) for c in got] == [(c.tokens, c.depths) for c in plain]


def test_waves_leave_no_lane_where_the_budget_leaves_none():
    """Then they do the work of plain decoding, pass by pass."""
    params = Params(12, 4, ignore_eos=True)
    prompts = [[5 + n, 6, 7] for n in range(4)]
    engine = Engine(build(), rows=4, length=64, wave=6)
    plain = engine.generate(prompts, params)
    reads = engine.loop.counts.reads.total()
    engine.loop.eager_tick.budget = 4
    assert engine.generate(prompts, replace(params, decoder="wave", wave=6)) == plain
    assert engine.loop.counts.reads.total() == 2 * reads
    engine.loop.eager_tick.budget = 10
    some = engine.generate(prompts, [replace(params, decoder="wave", wave=6), *[params] * 3])
    assert [c.tokens for c in some] == [c.tokens for c in plain]
    assert some[0].items > plain[0].items  # guesses, most of them wrong in a random model
    assert [c.passes for c in some[1:]] == [c.passes for c in plain[1:]]


def test_the_knee_is_where_a_pass_takes_half_more(monkeypatch):
    engine = Engine(build(), rows=8, length=64, wave=4)
    times = iter([0.7, 0.3, 0.6, 0.4, 0.7, 0.4, 0.8, 0.5, 0.9, 0.59, 1.0, 0.6, 1.0, 0.6])
    costs = engine.loop.measure(lambda seconds: seconds * 0 + next(times))
    assert costs.knee() == 6
    assert costs.passes == {1: 0.7, 2: 0.6, 3: 0.7, 4: 0.8, 6: 0.9, 8: 1.0}
    assert engine.loop.measure(lambda seconds: seconds * 0 + 1.0).knee() == 32
    params = Params(6, 4, ignore_eos=True)
    assert engine.generate([[5, 6]], params) == Engine(build(), rows=1, length=64).generate([[5, 6]], params)


def test_exits_wait_as_long_as_the_model_of_their_cost_says():
    """Against a simulation of what the docstring of `patience` describes: every wait, the least time a token."""
    a, b, c, d, residents, depth = 1.0, 0.02, 3.0, 0.05, 32, 4.0
    sizes = [1, 8, 64]
    costs = Costs({n: a + b * n for n in sizes}, {n: c + d * n for n in sizes})

    def seconds(every: int) -> float:
        running = residents * depth / (depth + (every - 1) / 2)
        tokens = running * every / depth
        return (every * (a + b * running) + c + d * tokens) / tokens

    best = min(range(1, 9), key=seconds)
    assert best > 2
    assert costs.patience(20, 5, depth) == min(best, depth) - 1
    assert costs.patience(20, 5, 1.0) == 0
    free = Costs(costs.passes, dict.fromkeys(sizes, 0.0))
    assert free.patience(20, 5, depth) == 0


def test_exits_of_one_depth_meet():
    """Requests that begin in different ticks are read out together from then on, and then none waits."""
    prompts, params = [[5, n, 6, 7] for n in range(3)], Params(40, 6, ignore_eos=True)

    def run(wait: int) -> tuple[list, int, int]:
        """With a prompt in each of the first steps, of 8 ticks: 2 or more ticks apart."""
        engine = Engine(build(), rows=3, length=64, max_recurrences=6, ticks=8, prompt_lanes=4, coda_wait=wait)
        done = engine.generate(prompts, params)
        return [c.tokens for c in done], engine.loop.counts.reads.total(), engine.loop.counts.passes.total()

    (apart, many, _), (together, few, passes) = run(0), run(5)
    assert apart == together
    assert many > 2.5 * 40
    assert few < 1.3 * 40
    assert passes < 1.1 * 40 * 6


def test_a_diffusion_ends_where_positions_do():
    from loopwise.serve.engine.diffusion_settings import DiffusionSettings

    engine = Engine(build(), rows=1, length=20, wave=4, kv_policy="single")
    params = Params(60, 4, ignore_eos=True, decoder="diffusion", diffusion=DiffusionSettings(inner=2, threshold=0.3))
    assert len(engine.generate([[5, 6, 7]], params)[0].tokens) == 18
    assert torch.isfinite(engine.loop.state.lanes.s).all()


def test_exits_wait_while_passes_are_full_without_them():
    """With fewer lanes than requests: then no pass is narrower, few are read out alone, and the tokens are the same."""
    draw = random.Random(0)
    prompts = [[5, n, 6, 7] for n in range(8)]
    params = [Params(30, 4, ignore_eos=True, trace=tuple(draw.randint(1, 4) for _ in range(40))) for _ in prompts]

    def run(width: int, measured: bool) -> tuple[list, Counter[int], Counter[int]]:
        engine = Engine(build(), rows=8, length=64, kv_policy="last-exited", ticks=50, width=width)
        if measured:
            engine.loop.schedule.costs = Costs(
                {1: 1.0, 8: 1.0}, {1: 0.0, 8: 0.0}
            )  # nothing is won by waiting in itself
        done = engine.generate(prompts, params)
        counts = engine.loop.counts
        return [(c.tokens, c.depths) for c in done], counts.passes, counts.reads

    whole, _, _ = run(0, False)
    plain, passes, reads = run(3, False)
    waiting, same_passes, fewer = run(3, True)
    assert whole == plain == waiting
    assert same_passes.total() <= passes.total()
    assert same_passes[3] >= 0.9 * passes[3]
    assert fewer.total() < 0.6 * reads.total()
    assert max(fewer) >= 6
