"""Waves in graph ticks, on the CPU: the text of plain decoding, and no value of the device in the host's way."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loopwise.serve import Engine, Params
from loopwise.serve.engine.graph_tick import GraphTick
from loopwise.serve.engine.transitions import drafts as positions
from tests.helpers.engines import build, requests
from tests.helpers.graph_ticks import MODELS, recorder, runs_of
from tests.helpers.waves import agreeing, drafts


def with_graphs(model: Any, **options: Any) -> Engine:
    """An engine with graph ticks, and waves."""
    sizes = {"max_num_seqs": 5, "max_model_len": 100, "passes_per_step": 7, "max_in_flight": 5, **options}
    engine = Engine(model, cuda_graphs=False, **sizes)
    with torch.inference_mode():
        engine._record(recorder())
        engine.loop.warm_up()
    return engine


class Waits(TorchDispatchMode):
    """Refuses operations for which the host waits for the device, but in the reference attention: no GPU has it.

    In inference mode, those that consist of others come whole: a number is read by `item`, a list by `resolve_neg`.
    """

    NAMES = ("item", "_local_scalar_dense", "resolve_neg", "is_nonzero", "nonzero", "masked_select", "unique", "equal")
    NAMES += ("repeat_interleave",)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_flags = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.NAMES or by_flags or (name == "where" and len(args) == 1):
            files = [frame.filename for frame in traceback.extract_stack()]
            assert any(file.endswith("attention/reference.py") for file in files), name
        return func(*args, **(kwargs or {}))


def guarded(step: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with Waits():
            return step(*args)

    return call


def guard(tick: GraphTick) -> None:
    """Guard all that `tick` records, and the choice of lanes before it. Nothing is recorded yet."""
    tick._pass, tick._read_out = guarded(tick._pass), guarded(tick._read_out)
    tick.steps = tick.steps._replace(choose=guarded(tick.steps.choose))


OPTIONS: list[dict[str, Any]] = [{}, {"max_lanes": 9}, {"budget": 8}, {"compile": True}, {"max_lanes": 9, "budget": 4}]
CASES = [(policy, options) for options in OPTIONS for policy in ("per-depth", "last-exited")]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (*CASES[:1], *CASES[3:-1])]


@pytest.mark.parametrize(("policy", "options"), [*CASES[1:3], *SLOW, CASES[-1]], ids=str)
def test_waves_and_plain_requests_have_the_text_of_plain_decoding(policy, options):
    kind = MODELS["huginn-like" if "max_lanes" in options else "lora"]
    draw = random.Random(repr((policy, options)))
    prompts, params = requests(draw.randrange(999), 10, policy, ["fixed", "latent-diff", "cosine"])
    for n, p in enumerate(params):
        params[n] = replace(p, temperature=n % 3 / 2, top_p=0.9, seed=n, stop_token_ids=tuple(range(9)), max_tokens=12)
    waves = [replace(p, decoder="wave", max_in_flight=draw.randint(2, 5), **drafts(draw)) for p in params]
    mixed = [draw.choice(pair) for pair in zip(params, waves, waves, strict=True)]
    plain = Engine(build(**kind), max_num_seqs=5, max_model_len=100, kv_policy=policy).generate(prompts, params)
    budget = options.pop("budget", 0) if "budget" in (options := dict(options)) else 0
    engine = with_graphs(build(**kind), kv_policy=policy, **options)
    engine.loop.eager_tick.budget = budget
    assert engine.loop.graph_tick is not None
    if "compile" not in options:
        guard(engine.loop.graph_tick)
    got = engine.generate(prompts, mixed)
    assert [(c.tokens, c.depths, c.error) for c in got] == [(c.tokens, c.depths, None) for c in plain]
    keys = engine.loop.graph_tick.replays
    assert any(key[0] == "read" and key[2] for key in keys)  # with waves
    if options.get("max_lanes"):
        assert any(key[0] == "pass" and key[3] for key in keys)  # with lanes that wait


@pytest.mark.parametrize("policy", ["per-depth", "last-exited"])
@pytest.mark.parametrize("options", [{}, {"max_lanes": 9}], ids=["budget", "max_lanes"])
def test_more_positions_than_graphs_have_rows_stay_in_graphs(policy, options):
    """Within a budget, waves have few positions in flight. So a read-out has room, also after others have come."""
    kind = MODELS["huginn-like"]
    prompts, params = requests(61, 12, policy, ["fixed", "latent-diff"])
    params = [replace(p, decoder="wave", max_in_flight=5, max_tokens=4 + 3 * (n % 4)) for n, p in enumerate(params)]
    plain = [replace(p, decoder="plain", max_in_flight=1) for p in params]
    want = Engine(build(**kind), max_num_seqs=7, max_model_len=100, kv_policy=policy).generate(prompts, plain)
    engine = with_graphs(build(**kind), kv_policy=policy, max_num_seqs=7, **options)
    engine.loop.eager_tick.budget = 9
    tick = engine.loop.graph_tick
    assert tick is not None
    tick.cache.max_rows = 16  # for up to 35 positions
    waiting, eager = [], engine.loop.eager_tick.run

    def read_out(every: torch.Tensor, starts: int) -> None:
        waiting.append((int(positions.due(engine.loop.state).sum()), len(every)))
        type(tick)._read_out(tick, every, starts)

    def prompts_alone(max_passes: int) -> Any:
        assert engine.loop.work.chunks, "a tick without prompts runs without a graph"
        return eager(max_passes)

    tick._read_out, engine.loop.eager_tick.run = read_out, prompts_alone
    # Other requests come while waves have more positions in flight than they may have then.
    got = engine.generate(prompts[:1], params[:1]) + engine.generate(prompts[1:], params[1:])
    assert [(c.tokens, c.depths) for c in got] == [(c.tokens, c.depths) for c in want]
    assert max(due for due, _ in waiting) > 5
    assert all(due <= room for due, room in waiting)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_read_outs_come_at_the_cadence(every):
    """A wave starts a position every K passes, and is read out every K passes, as in eager ticks."""
    plain = Params(21, 8, ignore_eos=True)
    (want,) = Engine(agreeing(8), max_num_seqs=1, max_model_len=64).generate([[5, 6, 7]], plain)
    engine = with_graphs(agreeing(8), max_num_seqs=1, max_model_len=64, max_in_flight="auto", passes_per_step=99)
    wave = replace(plain, decoder="wave", max_in_flight="auto", draft_every=every)
    (done,) = engine.generate([[5, 6, 7]], wave)
    assert (done.tokens, done.depths) == (want.tokens, want.depths)
    assert every * 19 + 8 <= done.passes < every * 20 + 8
    assert done.passes // every - 1 <= engine.loop.counts.reads.total() <= done.passes // every + 3


@pytest.mark.parametrize("limit", ["budget", "max_lanes"])
def test_waves_without_lanes_take_the_passes_and_read_outs_of_plain_decoding(limit):
    """Also those read-outs that find nothing to read."""
    plain, prompts = Params(7, 4, ignore_eos=True), [[5, 6, 7], [8, 9], [10]]
    more = {"max_lanes": 4} if limit == "max_lanes" else {}
    engine = with_graphs(build(), kv_policy="last-exited", max_num_seqs=3, passes_per_step=99, **more)
    runs = runs_of(engine)
    want = engine.generate(prompts, plain)
    reads = sum(count for (name, _), count in runs.items() if name == "read")
    engine.loop.eager_tick.budget = 4 if limit == "budget" else 0
    assert engine.generate(prompts, replace(plain, decoder="wave", max_in_flight=4)) == want
    assert sum(count for (name, _), count in runs.items() if name == "read") == 2 * reads
