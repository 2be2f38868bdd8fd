"""Measured costs of passes and read-outs, and their use: lanes of a wave, waits of exits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from loopwise.serve import Engine, Params
from loopwise.serve.engine import costs
from loopwise.serve.engine.costs import Costs
from tests.helpers.engines import build


def test_the_knee_is_where_a_pass_takes_half_more(monkeypatch):
    engine = Engine(build(), max_num_seqs=8, max_model_len=64, max_in_flight=4)
    times = iter([(0.7, 0.3), (0.6, 0.4), (0.7, 0.4), (0.8, 0.5), (0.9, 0.59), (1.0, 0.6), (1.0, 0.6)])
    with monkeypatch.context() as patched:
        patched.setattr(costs, "_samples", lambda *_: iter([(9.0, 9.0), next(times)]))  # the first warms up
        found = engine.loop.measure()
    assert found.knee() == 6
    assert found.passes == pytest.approx({1: 0.7, 2: 0.6, 3: 0.7, 4: 0.8, 6: 0.9, 8: 1.0})
    assert engine.loop.measure(lambda seconds: seconds * 0 + 1.0).knee() == 32
    params = Params(6, 4, ignore_eos=True)
    assert engine.generate([[5, 6]], params) == Engine(build(), max_num_seqs=1, max_model_len=64).generate(
        [[5, 6]], params
    )


@pytest.mark.parametrize(("room", "widest"), [(64, 32), (10, 10)])
def test_all_lanes_of_the_widest_wave_are_measured(room, widest):
    """Also those of one request alone, as far as it has positions."""
    model = build(num_recurrences=40, max_recurrences=40)
    engine = Engine(model, max_num_seqs=1, max_model_len=room, max_in_flight="auto")
    assert engine.loop.config.max_in_flight == 32
    assert engine.loop.measure(lambda seconds: seconds * 0 + 1.0).knee() == widest


def test_ranks_measure_as_often_as_each_other(monkeypatch):
    """Whatever their clocks say: a pass of one rank waits for those of the others."""
    measured = []
    for clock in (1e-9, 1.0):  # seconds between two looks at it
        engine, ticks = Engine(build(), max_num_seqs=2, max_model_len=64), itertools.count()
        agreed = itertools.count()

        def agree(seconds: float, agreed: Any = agreed) -> float:
            next(agreed)
            return 0.4 * costs.SECONDS

        with monkeypatch.context() as patched:
            patched.setattr(costs.time, "perf_counter", lambda clock=clock, ticks=ticks: next(ticks) * clock)
            engine.loop.measure(agree)
        measured.append((next(ticks), next(agreed)))
    assert measured[0] == measured[1]
    assert measured[0][0] > 12


def test_exits_wait_as_long_as_costs_the_least():
    """`patience` picks the wait with the least time a token, by the model in its docstring, over all waits."""
    a, b, c, d, residents, depth = 1.0, 0.02, 3.0, 0.05, 32, 4.0
    sizes = [1, 8, 64]
    known = Costs({n: a + b * n for n in sizes}, {n: c + d * n for n in sizes})

    def seconds(every: int) -> float:
        running = residents * depth / (depth + (every - 1) / 2)
        tokens = running * every / depth
        return (every * (a + b * running) + c + d * tokens) / tokens

    best = min(range(1, 9), key=seconds)
    assert best > 2
    assert known.patience(20, 5, depth) == min(best, depth) - 1
    assert known.patience(20, 5, 1.0) == 0
    free = Costs(known.passes, dict.fromkeys(sizes, 0.0))
    assert free.patience(20, 5, depth) == 0
