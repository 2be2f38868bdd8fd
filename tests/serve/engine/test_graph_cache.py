"""The graphs that are kept: a bounded number, made at the start, each for itself where one fails. On the CPU."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from loopwise.serve import Engine, Params
from loopwise.serve.engine.graph_tick import GraphTick
from loopwise.serve.engine.graphs import CACHE, TRIES, GraphCache, padded, reserved_bytes, sizes
from loopwise.serve.engine.loop_config import LoopConfig
from tests.helpers.engines import build
from tests.helpers.graph_ticks import run_once

SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 9}, {"presence_penalty": 0.5}]
RULES: list[dict[str, Any]] = [
    {},
    {"exit_rule": "latent-diff", "exit_threshold": 0.5},
    {"exit_rule": "cosine", "exit_threshold": 0.3},
    {"exit_rule": "gate", "exit_threshold": 0.6},
]
GATED = {"prelude": [], "core": [0, 1, 2], "coda": [], "injection": "none", "exit_gate": True}


class Recorded:
    """A graph's stand-in, which can be watched as it goes."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def __call__(self) -> None:
        self.function()


def record(function: Callable[[], None]) -> Recorded:
    function()
    return Recorded(function)


def test_the_least_recently_used_goes_whosever_it_is():
    cache, first, second, gone = GraphCache(record, most=3), {}, {}, []
    for owner, key in ((first, "a"), (second, "a"), (first, "b"), (first, "a"), (second, "c"), (second, "d")):
        replay = cache.get(owner, key, 8, lambda: None)
        gone.append(weakref.ref(replay))
    assert (list(first), list(second)) == (["a"], ["c", "d"])
    assert cache.captures == 5
    del replay
    gc.collect()
    assert [ref() is None for ref in gone] == [False, True, True, False, False, False]


def test_a_failed_capture_costs_its_own_key():
    calls: list[str] = []

    def fails_at_b(function: Callable[[], None]) -> Callable[[], Any]:
        function()
        if calls[-1] == "b":
            raise torch.OutOfMemoryError("no memory is left")
        return lambda: calls.append("replayed")

    cache, replays = GraphCache(fails_at_b), {}
    cache.get(replays, "a", 4, lambda: calls.append("a"))
    with pytest.warns(UserWarning, match="capture failed at 8 lanes; such passes run without a graph: no memory"):
        replay = cache.get(replays, "b", 8, lambda: calls.append("b"))
    replay()
    cache.get(replays, "b", 8, lambda: calls.append("b"))()
    cache.get(replays, "c", 16, lambda: calls.append("c"))()
    assert calls == ["a", "b", "b", "b", "c", "replayed"]
    assert (cache.captures, cache.failures, cache.max_rows) == (2, 1, 256)


def test_where_nothing_can_be_recorded_no_more_is_tried():
    def refuse(function: Callable[[], None]) -> Callable[[], Any]:
        raise RuntimeError("it waits")

    cache = GraphCache(refuse)
    for n in range(TRIES):
        assert cache.max_rows > 0
        with pytest.warns(UserWarning, match="it waits"):
            cache.get({}, n, n, lambda: None)
    assert cache.max_rows == 0


def engines(**options: Any) -> tuple[Engine, Engine, GraphTick]:
    """An engine without graphs, one with them, and its ticks."""
    limits = {"max_num_seqs": 8, "max_model_len": 48, "passes_per_step": 5, "kv_policy": "last-exited"}
    plain, made = (Engine(build(**GATED), cuda_graphs=False, **{**limits, **options}) for _ in range(2))
    with torch.inference_mode():
        made._record(record)
    assert made.loop.graph_tick is not None
    return plain, made, made.loop.graph_tick


def test_common_mixes_are_recorded_at_the_start():
    """No graph of a tick is recorded for the first requests of these mixes, and the start leaves nothing behind."""
    plain, made, ticks = engines()
    ticks.record_common(exits=False)
    of_size = sizes(8)
    assert of_size == [8, 4, 2, 1]
    assert set(ticks.replays) == {
        *(("pass", n, exits, False) for n in of_size for exits in (False, True)),
        *(
            ("read", n, 0, *how, False, False)
            for n in of_size
            for how in ((False, False), (True, False), (False, True))
        ),
    }
    assert ticks.cache.captures == 20
    assert not made.loop.work.in_use
    assert not made.loop.rules.in_use
    recorded = set(ticks.replays)
    for count, sampling, rule in itertools.product((1, 3, 8), SAMPLING[:3], RULES):
        params = Params(3, 3, ignore_eos=True, **sampling, **rule)
        prompts = [[5 + n, 6, 7] for n in range(count)]
        assert made.generate(prompts, params) == plain.generate(prompts, params)
    assert set(ticks.replays) == recorded


@pytest.mark.parametrize("budget", [0, 9])
def test_waves_find_their_graphs_recorded(budget):
    """Where requests are waves by default, whatever their number; plain ones among them need no other read-out."""
    plain, made, ticks = engines(max_in_flight=4)
    made.loop.eager_tick.budget = budget
    ticks.record_common(exits=False, positions=4)
    recorded = set(ticks.replays)
    assert {key[1:3] for key in recorded if key[0] == "read" and key[2]} == {
        (n, min(n, 8)) for n in (4, 8, 16, 32) if n <= 16 or not budget
    }
    waves, prompts = list[Params](), list[list[int]]()
    for count in range(1, 9):
        params = [Params(3 + n % 4, 3, ignore_eos=True, **SAMPLING[count % 3]) for n in range(count)]
        waves = [replace(p, decoder="wave", max_in_flight=4) for p in params]
        prompts = [[5 + n, 6, 7] for n in range(count)]
        assert [c.tokens for c in made.generate(prompts, waves)] == [c.tokens for c in plain.generate(prompts, params)]
    assert set(ticks.replays) == recorded
    mixed = [replace(p, decoder="plain", max_in_flight=1) if n % 3 else p for n, p in enumerate(waves)]
    made.generate(prompts, mixed)
    assert {key for key in ticks.replays if key[0] == "read"} == {key for key in recorded if key[0] == "read"}


def test_the_start_records_no_more_than_are_kept():
    """The mixes without exits come first, and the widest of each."""
    _, _, ticks = engines(max_num_seqs=100)
    ticks.record_common(exits=False)
    assert len(ticks.replays) == min(CACHE, 5 * len(sizes(100))) == ticks.cache.captures
    assert {key[1] for key in ticks.replays} == set(sizes(100))
    assert [n for n in range(1, 101) if padded(n) not in sizes(100)] == []


def test_common_graphs_outlive_measured_ones():
    """Costs are measured first, as a server does: by graphs that no request may use."""
    _, made, ticks = engines(max_num_seqs=100)
    made.loop.measure()
    measured = set(ticks.replays)
    ticks.record_common(exits=True)
    common = set(ticks.replays)
    assert len(common) == CACHE
    assert measured - common
    assert {("pass", n, True, False) for n in sizes(100)} <= common


def test_more_logits_than_are_reserved_are_read_in_parts(monkeypatch):
    """Those of all requests fit, and those of waves up to the rows of a graph."""
    config = Engine(build(), max_num_seqs=4, max_model_len=48).loop.config
    assert config.most_read == 4
    assert replace(config, max_in_flight=8).most_read == 32
    assert replace(config, max_num_seqs=64, max_in_flight=8).most_read == 256
    assert replace(config, max_num_seqs=300, max_in_flight=8).most_read == 300
    waves = [
        replace(Params(9, 3, ignore_eos=True, seed=n, **SAMPLING[n]), decoder="wave", max_in_flight=4) for n in range(4)
    ]
    prompts = [[5 + n, 6, 7] for n in range(4)]
    found = []
    for most in (256, 3):
        monkeypatch.setattr(LoopConfig, "most_read", most)
        engine = Engine(build(**GATED), cuda_graphs=False, max_num_seqs=4, max_model_len=48, max_in_flight=4)
        rows, head = [], engine.loop.forward.head
        engine.loop.forward.head = lambda x, head=head, rows=rows: (rows.append(len(x)), head(x))[1]
        found.append(engine.generate(prompts, waves))
        assert (max(rows) > 4) if most > 4 else (max(rows) == 3)
    assert found[0] == found[1]


def test_however_requests_are_mixed_few_graphs_are_kept():
    plain, made, ticks = engines()
    ticks.cache.most = 6
    for number, (count, sampling, rule) in enumerate(itertools.product((1, 2, 4, 7), SAMPLING, RULES)):
        params = Params(2, 2, ignore_eos=True, seed=number, **sampling, **rule)
        prompts = [[5 + n, 6, number] for n in range(count)]
        assert made.generate(prompts, params) == plain.generate(prompts, params)
        graphs = made.loop.eager_tick.passes.graphs
        assert graphs is not None
        assert len(ticks.replays) + len(graphs.replays) <= 6
    assert ticks.cache.captures > 6


def test_an_engine_goes_on_beside_a_failed_capture():
    plain, made, ticks = engines()
    ticks.cache.record = lambda function: run_once(function)
    prompts = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    want = plain.generate(prompts, Params(6, 3, ignore_eos=True))
    assert made.generate(prompts, Params(6, 3, ignore_eos=True)) == want
    before = len(ticks.replays)

    def lacks_memory(function: Callable[[], None]) -> Any:
        raise torch.OutOfMemoryError("no memory is left")

    ticks.cache.record = lacks_memory
    drawn = Params(6, 3, ignore_eos=True, temperature=1.0)
    with pytest.warns(UserWarning, match="no memory is left"):
        got = made.generate(prompts, drawn)
    assert got == plain.generate(prompts, drawn)
    assert len(ticks.replays) > before
    assert ticks.fits() is True
    assert made.generate(prompts, Params(6, 3, ignore_eos=True)) == want


def test_the_reserve_grows_with_rows_up_to_the_widest_graph():
    assert reserved_bytes(8, 1000) < reserved_bytes(256, 1000) == reserved_bytes(4096, 1000)
    assert reserved_bytes(256, 131_072) < 3 << 30
