"""Benchmarks of the engine core, on tiny models: what they compare, and figures that stay when they are killed."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import pytest

from bench import exact, graphs, waves
from bench.engine import check_graphs
from bench.figures import FILE, read
from loopwise.serve import Engine, Params
from loopwise.serve.engine.costs import Costs
from loopwise.serve.engine.loop import Loop
from tests.helpers.engines import build


def told(monkeypatch: Any, tmp_path: Any, module: Any, line: str) -> tuple[Any, list[dict[str, Any]]]:
    """Run a benchmark's command line. Returns its result and its figures."""
    file = tmp_path / "figures.jsonl"
    file.unlink(missing_ok=True)
    monkeypatch.setenv(FILE, str(file))
    monkeypatch.setattr(exact.torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(sys, "argv", [module.__name__, *line.split()])
    return module.main(), read(file)


@pytest.mark.parametrize(("budget", "rows"), [(0, 16), (8, 8)])
def test_waves_and_plain_decoding_have_passes_of_one_width(budget, rows):
    args = argparse.Namespace(shape="tiny", requests=4, tokens=9)
    engine = exact.build(args, exact.torch.bfloat16, kv_policy="per-depth", max_in_flight=4, budget=budget)
    assert exact.fix_sizes(engine, 4, 4) == rows
    ticks: Any = engine.loop.graph_tick
    for decoder in ("plain", "wave"):
        ticks.replays.clear()
        engine.loop.counts.passes.clear()
        params = Params(9, ignore_eos=True, decoder=decoder, max_in_flight=4)
        engine.generate([[5] * 6, [8], [9] * 10, [11, 12]], params)
        assert {key[:2] for key in ticks.replays} == {("pass", rows), ("read", 16)}
        assert {key[3] for key in ticks.replays if key[0] == "pass"} == {bool(budget)}
        assert engine.loop.counts.passes.pop(19) == 4  # the prompts; all other passes are of graphs
        assert max(engine.loop.counts.passes) <= rows
    with pytest.raises(SystemExit, match="99 waves of 4: graphs have at most 256 rows"):
        exact.fix_sizes(engine, 99, 4)


@pytest.mark.parametrize("more", ["", pytest.param("--width 6 --budget 8", marks=pytest.mark.slow)])
def test_exact_compares_texts(more, tmp_path, monkeypatch):
    line = f"--shape tiny --requests 3 --tokens 12 --policy per-depth {more}"
    code, lines = told(monkeypatch, tmp_path, exact, line)
    assert (code, lines[0]["value"]) == (0, "not run")  # kernels, without a GPU
    rows = 8 if more else 16
    assert [(each["what"], each["value"], each["tokens"]) for each in lines[1:]] == [
        (f"per-depth, {kind}, bfloat16, passes of {rows} rows: waves against plain decoding", "3 of 3", "36 of 36")
        for kind in ("greedy", "sampled")
    ]
    assert exact.same([(1, 2, 3), (4, 5)], [(1, 2, 4), (4, 5)]) == (1, 4, 5)
    monkeypatch.setattr(exact, "same", lambda *_: (2, 30, 36))
    assert told(monkeypatch, tmp_path, exact, line)[0] == 1


def test_waves_run_by_the_measured_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Loop, "measure", lambda loop: Costs({1: 1.0, 2: 1.4, 4: 9.0}, {1: 0.0, 2: 0.0, 4: 0.0}))
    line = "--shape tiny --recurrences 4 --batch 2 --profile easy --every auto,1 --tokens 6 --pairs 1"
    _, lines = told(monkeypatch, tmp_path, waves, line)
    assert [each["budget"] for each in lines] == [2, 2]
    assert [each["budget"] for each in told(monkeypatch, tmp_path, waves, f"{line} --budget 5")[1]] == [5, 5]
    assert "draft_every=auto, budget=5: " in capsys.readouterr().out


def test_auto_learns_each_profile_anew():
    engine = Engine(build(), max_num_seqs=1, max_model_len=64, max_in_flight=4, kv_policy="per-depth")
    auto = Params(30, 4, ignore_eos=True, decoder="wave", max_in_flight=4, draft_every="auto")
    (done,) = engine.generate([[5, 6]], auto)
    assert sum(engine.loop.cadence.settled) > 0
    waves.forget(engine)
    assert sum(engine.loop.cadence.settled) == 0
    assert engine.generate([[5, 6]], replace(auto, draft_every=1))[0].tokens == done.tokens


def test_figures_of_graphs_come_as_they_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "EVERY", 2)
    _, lines = told(monkeypatch, tmp_path, graphs, "--rows 2 --mixes 5 --hidden 64 --layers 4 --vocabulary 512")
    assert [each["what"] for each in lines[::2]] == ["graphs at the start", *(f"a step, {n} mixes" for n in (2, 4, 5))]
    assert [each["unit"] for each in lines[1::2]] == [f"in {n} mixes" for n in (2, 4, 5)]


def test_a_graph_that_was_not_recorded_fails_the_benchmark():
    engine = Engine(build(), max_num_seqs=1, max_model_len=64)
    check_graphs(engine)
    engine.loop.use_graphs(graphs.call)
    check_graphs(engine)
    ticks: Any = engine.loop.graph_tick
    ticks.cache.failures = 2
    with pytest.raises(SystemExit, match="2 captures of CUDA graphs failed"):
        check_graphs(engine)
