"""bfloat16 and Muon: two processes compared with one."""

from __future__ import annotations

import pytest

from tests.helpers.train_tiny import RECURRENCE, history, launched, run, weights

SETTINGS = [*RECURRENCE, "steps=10", "log_every=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "settings", "apart"),
    [
        ("fsdp2", ["optimiser.kind=muon"], 1e-4),
        ("fsdp2", ["precision=bfloat16"], 0.02),
        ("zero2", ["precision=bfloat16"], 0.02),
        ("zero3", ["precision=bfloat16"], 0.02),
    ],
)
def test_two_processes_equal_one(launcher, settings, apart, recurrent, command, tmp_path):
    run(command(recurrent, tmp_path / "one", *SETTINGS, *settings, "gradient_accumulation=2"))
    done = launched(command(recurrent, tmp_path / "two", *SETTINGS, *settings), launcher)
    assert done.returncode == 0, done.stderr
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), abs=apart)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    if apart < 1e-3:
        for name, x in one.items():
            assert (x - two[name]).abs().max().item() < 1e-4, name
    else:  # what rounds differently is the computation: weights stay in float32, and learn
        assert all(x.dtype == two[name].dtype for name, x in one.items())
        assert history(tmp_path / "two")[-1] < history(tmp_path / "two")[0]
