"""The trace simulator: its passes are the engine's, and drafts settle where they are right."""

from __future__ import annotations

from typing import Any

import pytest

from bench import wave_trace
from loopwise.serve import Engine, Params
from loopwise.serve.engine.costs import Costs
from loopwise.serve.engine.loop import Loop
from tests.helpers.engines import build
from tests.helpers.waves import agreeing


def found(make: Any, temperature: float, pairs: int = 0) -> dict[str, Any]:
    engine = Engine(make(), max_num_seqs=1, max_model_len=64, max_in_flight="auto", kv_policy="per-depth")
    params = Params(14, 8, ignore_eos=True, temperature=temperature, seed=1)
    return wave_trace.compare(engine, make(), [[5, 6, 7]], params, 1.0, pairs)


@pytest.mark.parametrize("temperature", [0.8, pytest.param(0.0, marks=pytest.mark.slow)])
def test_simulated_passes_are_those_of_the_engine(temperature):
    """One random model without a coda has mostly wrong drafts, the other has right ones."""
    flat: dict[str, Any] = {"prelude": [0, 1], "core": [2], "coda": [], "recurrence_damping": 0.3}
    wrong = found(lambda: build(num_recurrences=8, max_recurrences=8, **flat), temperature)
    right = found(lambda: agreeing(8), temperature)
    assert right["share_by_t"][1] == 1.0
    assert 2 < wrong["mean_t"] < 8
    for each in (wrong, right):
        measured = [row for row in each["schedules"] if "same_text" in row]
        assert all(row["same_text"] for row in measured)
        passes = [row["measured_passes"] for row in measured]
        assert [row["passes"] for row in measured] == pytest.approx(passes, rel=0.15)
    loopspec = {row["schedule"]: row["passes"] for row in right["schedules"] if "LoopSpec" in row["schedule"]}
    assert loopspec == {"LoopSpec's schedule, 1": 1, "LoopSpec's schedule, 1:2": 1, "LoopSpec's schedule, 2": 2,
                        "LoopSpec's schedule, 2:2": 2, "LoopSpec's schedule, 4": 4}  # fmt: skip


def test_predictions_follow_from_measured_costs(monkeypatch, capsys):
    """Where a pass takes as long as its lanes are many, and a read-out nothing, a wave saves nothing; where all take
    the same, it saves its passes, as in the model of --cost."""
    alike, each = ({1: 2.0, 64: 2.0},) * 2, ({1: 1.0, 64: 64.0}, {1: 0.0, 64: 0.0})
    for costs in (alike, each):
        monkeypatch.setattr(Loop, "measure", lambda loop, costs=costs: Costs(*costs))
        right = found(lambda: agreeing(8), 0.0, pairs=int(costs is each))
        assert right["plain_seconds"]["predicted"] == pytest.approx(18.0 if costs is alike else 8.0)
        for row in right["schedules"]:
            want = row["simulated_speedup"] if costs is alike else 8 / row["lanes"]
            assert row["predicted_speedup"] == pytest.approx(want)
    waves = [row for row in right["schedules"] if row["schedule"].startswith("wave")]
    assert all(row["lanes"] == pytest.approx(8.0) for row in waves)  # no lane that waits counts as one that runs
    assert all(len(row["measured_speedups"]) == 1 for row in right["schedules"] if "same_text" in row)
    assert right["plain_seconds"]["measured"] > 0
    wave_trace.printed(right, 1.0)
    assert capsys.readouterr().out.count("x measured") == len([r for r in right["schedules"] if "same_text" in r])


@pytest.mark.parametrize(("drafts", "t"), [([7, 7, 7], 1), ([3, 7, 7], 2), ([7, 3, 7], 3), ([1, 2, 3], 3), ([7], 1)])
def test_a_draft_settles_where_it_stays(drafts, t):
    assert wave_trace.settles(drafts) == t
