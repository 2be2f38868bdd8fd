"""A wave is exact: its tokens and depths are those of plain decoding, for any model, prompt, seed, width and budget."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwise.serve import Engine, Params
from loopwise.serve.engine.loop import Prompt
from tests.helpers.engines import build, requests
from tests.helpers.tiny import VOCAB
from tests.helpers.waves import agreeing, drafts

RULES = {"fixed": None, "latent-diff": 0.7, "cosine": 0.3, "kl": 0.3, "argmax-stability": 1.0}


SHAPES: list[dict[str, Any]] = [
    {},
    {"prelude": [], "core": [0, 2], "coda": [], "injection": "none"},
    {"prelude": [], "core": [0, 1, 2], "coda": [3], "injection": "add", "recurrence_norm": "each"},
    {"prelude": [0, 1], "core": [3], "coda": [2], "recurrence_norm": "last", "state_init": "normal", "state_std": 0.5},
]


@settings(max_examples=12, deadline=None, derandomize=True)
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
    waves = [replace(p, decoder="wave", max_in_flight=draw.randint(2, 7), **drafts(draw)) for p in params]
    rows, ticks = draw.randint(1, 6), draw.randint(1, 9)
    plain = Engine(build(model_type, **shape), max_num_seqs=4, max_model_len=64, kv_policy=policy).generate(
        prompts, params
    )
    engine = Engine(
        build(model_type, **shape),
        max_num_seqs=rows,
        max_model_len=64,
        kv_policy=policy,
        passes_per_step=ticks,
        max_in_flight=7,
    )
    engine.loop.eager_tick.budget = draw.choice((0, 1, rows, 2 * rows + 1))
    got = engine.generate(prompts, waves)
    assert [(c.tokens, c.depths) for c in got] == [(c.tokens, c.depths) for c in plain]


@pytest.mark.parametrize(
    ("policy", "width", "temperature"),
    [
        pytest.param(*case, marks=[] if case in (("per-depth", 0, 1.0), ("last-exited", 10, 0.0)) else pytest.mark.slow)
        for case in itertools.product(("per-depth", "last-exited"), (0, 10), (0.0, 1.0))
    ],
)
def test_a_wave_gives_the_tokens_of_plain_decoding(policy, width, temperature):
    rules = ["fixed", "latent-diff", "cosine", "kl"]
    prompts, params = requests(9, 24, policy, rules)
    params = [replace(p, temperature=temperature, seed=n, max_tokens=20) for n, p in enumerate(params)]
    draw = random.Random(4)
    waves = [
        replace(p, decoder="wave", max_in_flight=n % 7 + 1, **drafts(draw)) if n % 4 else p
        for n, p in enumerate(params)
    ]
    plain = Engine(build(), max_num_seqs=5, max_model_len=100, kv_policy=policy).generate(prompts, params)
    engine = Engine(
        build(),
        max_num_seqs=5,
        max_model_len=100,
        kv_policy=policy,
        passes_per_step=3,
        max_in_flight=7,
        max_lanes=width,
    )
    got = engine.generate(prompts, waves)
    assert [(c.tokens, c.depths) for c in got] == [(c.tokens, c.depths) for c in plain]
    if not width:
        assert sum(c.passes for c in got) < sum(c.passes for c in plain)
    assert all(c.items >= sum(c.depths[1:]) for c in got)


def test_waves_leave_no_lane_where_the_budget_leaves_none():
    """A wave without free lanes has the passes and read-outs of plain decoding."""
    params = Params(12, 4, ignore_eos=True)
    prompts = [[5 + n, 6, 7] for n in range(4)]
    engine = Engine(build(), max_num_seqs=4, max_model_len=64, max_in_flight=6)
    plain = engine.generate(prompts, params)
    reads = engine.loop.counts.reads.total()
    engine.loop.eager_tick.budget = 4
    assert engine.generate(prompts, replace(params, decoder="wave", max_in_flight=6)) == plain
    assert engine.loop.counts.reads.total() == 2 * reads
    engine.loop.eager_tick.budget = 10
    some = engine.generate(prompts, [replace(params, decoder="wave", max_in_flight=6), *[params] * 3])
    assert [c.tokens for c in some] == [c.tokens for c in plain]
    assert some[0].items > plain[0].items  # draft tokens: most are wrong in a random model
    assert [c.passes for c in some[1:]] == [c.passes for c in plain[1:]]


CADENCES: list[tuple[dict[str, Any], int, int]] = [
    ({}, 1, 8),
    ({"draft_every": 2}, 2, 4),
    ({"draft_every": 3}, 3, 3),
    ({"draft_every": 4}, 4, 2),
    ({"draft_every": 8}, 8, 1),
    ({"draft_depths": (2, 4)}, 2, 3),
    ({"draft_depths": (3,)}, 3, 2),
]


@pytest.mark.parametrize(("more", "passes", "reads"), CADENCES)
def test_passes_and_read_outs_of_a_token_where_drafts_are_right(more, passes, reads):
    """A position starts every K passes, as wide as "auto" makes it, and is read out R / K times, or at each depth."""
    count = 21
    engine = Engine(agreeing(8), max_num_seqs=1, max_model_len=64, max_in_flight="auto")
    plain = Params(count, 8, ignore_eos=True)
    (want,) = engine.generate([[5, 6, 7]], plain)
    engine.loop.counts.reads.clear()
    (done,) = engine.generate([[5, 6, 7]], replace(plain, decoder="wave", max_in_flight="auto", **more))
    assert (done.tokens, done.depths) == (want.tokens, want.depths)
    assert passes * (count - 2) + 8 <= done.passes < passes * (count - 1) + 8  # an exit may wait for the next drafts
    beyond = done.items - 8 * (count - 1)  # lanes of positions that stood behind the last
    assert 0 <= beyond <= 28
    lanes = sum(n * times for n, times in engine.loop.counts.reads.items()) - 3  # the prompt's
    assert reads * (count - 1) <= lanes <= reads * (count - 1) + beyond
    calls = (
        2 if more.get("draft_depths") == (3,) else 1
    )  # one for all that are due; exits whose draft was read once: own
    assert engine.loop.counts.reads.total() <= calls * (done.passes // passes) + 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_preempted_wave_goes_on_with_the_same_text(temperature):
    """Its tokens become part of its prompt, and its blocks were others' in between."""
    prompts, params = requests(11, 4, "last-exited", ["fixed", "latent-diff", "kl"])
    params = [replace(p, max_tokens=16, temperature=temperature, seed=7) for p in params]
    model = build()
    plain = Engine(model, max_num_seqs=1, max_model_len=100, kv_policy="last-exited").generate(prompts, params)
    model = build()
    engine = Engine(
        model, max_num_seqs=1, max_model_len=100, kv_policy="last-exited", passes_per_step=3, max_in_flight="auto"
    )
    loop, row, draw, preempted = engine.loop, torch.zeros(1, dtype=torch.long), random.Random(5), 0
    caches: Any = vars(loop.forward.attention)["caches"]
    for prompt, asked, want in zip(prompts, params, plain, strict=True):
        wave = replace(asked, decoder="wave", max_in_flight="auto", **drafts(draw))
        request, tokens = engine.request(wave), []
        with torch.inference_mode():
            sampling = engine.draws.admit(0, temperature, 0, 1.0, 0.0, 7)
            while len(tokens) < 16:
                loop.admit(0, replace(request, sampling=sampling, max_tokens=16 - len(tokens)))
                loop.prompt([Prompt(0, torch.tensor(prompt + tokens), 0, True, generated=len(prompt))])
                for _ in range(3):
                    loop.step(row)
                    tokens += loop.outputs(row)[0][0]
                request = replace(request, forced_depths=loop.release(0).tolist())
                for cache in (one for pair in caches for one in pair):
                    cache.normal_(std=4.0)
                preempted += 1
        assert tokens == want.tokens, wave
    assert preempted > 8


@pytest.mark.parametrize("depth", [3, 8])
@pytest.mark.parametrize("every", [2, 3, 4])
def test_wrong_drafts_cost_no_passes(depth, every):
    """Random weights draft wrongly, and a K that does not divide R is among the cases."""
    make, plain = lambda: build(num_recurrences=depth, max_recurrences=depth), Params(17, depth, ignore_eos=True)
    engine = Engine(make(), max_num_seqs=1, max_model_len=64, max_in_flight="auto")
    (want,) = engine.generate([[5, 6, 7]], plain)
    asked = replace(plain, decoder="wave", max_in_flight="auto", draft_every=min(every, depth))
    (done,) = engine.generate([[5, 6, 7]], asked)
    assert done.tokens == want.tokens
    assert done.passes <= 1.03 * want.passes


def test_a_rule_that_reads_logits_through_a_coda_sees_no_drafts():
    """The rule would read the coda's keys of drafts, and end positions at other depths: it is decoded plainly."""
    shape, draw = SHAPES[3], random.Random(1003)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(draw.choice((1, 4)))] for _ in range(8)]
    params = [Params(14, 4, 3, "argmax-stability", 1.0, ignore_eos=True, temperature=1.5, seed=n) for n in range(8)]
    sizes: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 64, "kv_policy": "last-exited"}
    want = Engine(build(**shape), **sizes).generate(prompts, params)
    waves = [replace(p, decoder="wave", max_in_flight=5) for p in params]
    assert Engine(build(**shape), max_in_flight=5, **sizes).generate(prompts, waves) == want
