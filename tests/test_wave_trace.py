"""The trace simulator: its passes are the engine's, and drafts settle where they are right."""

from __future__ import annotations

from typing import Any

import pytest

from bench import wave_trace
from loopwise.serve import Engine, Params
from tests.helpers.engines import build
from tests.helpers.waves import agreeing


def found(make: Any, temperature: float) -> dict[str, Any]:
    engine = Engine(make(), max_num_seqs=1, max_model_len=64, max_in_flight="auto", kv_policy="per-depth")
    params = Params(14, 8, ignore_eos=True, temperature=temperature, seed=1)
    return wave_trace.compare(engine, make(), [[5, 6, 7]], params, 1.0)


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


@pytest.mark.parametrize(("drafts", "t"), [([7, 7, 7], 1), ([3, 7, 7], 2), ([7, 3, 7], 3), ([1, 2, 3], 3), ([7], 1)])
def test_a_draft_settles_where_it_stays(drafts, t):
    assert wave_trace.settles(drafts) == t
