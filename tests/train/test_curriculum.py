"""The curriculum: its values, its purity, the law of its samples."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.train.curriculum import SAMPLERS, Curriculum, poisson_lognormal, uniforms

SCHEDULES = ["constant", "linear", "1-sqrt"]
curricula = st.builds(
    Curriculum,
    mean=st.integers(1, 64),
    steps=st.integers(1, 5000),
    schedule=st.sampled_from(SCHEDULES),
    sampler=st.sampled_from(SAMPLERS),
    backprop=st.none() | st.integers(1, 16),
    seed=st.integers(0, 2**40),
)


@given(curricula, st.data())
def test_depth_is_pure_and_within_bounds(curriculum, data):
    step = data.draw(st.integers(0, curriculum.steps - 1))
    depth = curriculum.at(step)
    # Whatever was asked before: another object, asked only this, says the same.
    curriculum.at(data.draw(st.integers(0, curriculum.steps - 1)))
    assert Curriculum(**vars(curriculum)).at(step) == depth == curriculum.at(step)
    assert 1 <= depth.num_recurrences <= curriculum.cap
    if curriculum.backprop is None:
        assert depth.grad_recurrences is None
    else:
        assert depth.grad_recurrences == min(curriculum.backprop, depth.num_recurrences)


@given(curricula)
def test_mean_grows_to_its_end(curriculum):
    means = [curriculum.mean_at(step) for step in range(0, curriculum.steps, max(1, curriculum.steps // 97))]
    assert means == sorted(means)
    assert means[0] >= 1
    assert means[-1] <= curriculum.mean
    if curriculum.steps >= 8:
        assert curriculum.mean_at(curriculum.steps - 1) == curriculum.mean


@pytest.mark.parametrize(
    ("schedule", "ramp", "expected"),
    [
        # linear over the first quarter of 100 steps: ceil(8 t / 25)
        ("linear", None, {0: 1, 1: 1, 3: 1, 4: 2, 12: 4, 13: 5, 24: 8, 25: 8, 99: 8}),
        # 8 (1 - sqrt(1 - t / 75)), rounded up: slow at first, steep at the end of the ramp
        ("1-sqrt", None, {0: 1, 17: 1, 18: 2, 37: 3, 60: 5, 70: 6, 74: 8, 75: 8, 99: 8}),
        ("linear", 1.0, {0: 1, 50: 4, 51: 5, 99: 8}),
        ("linear", 0.0, {0: 8, 99: 8}),
        ("constant", None, {0: 8, 99: 8}),
    ],
)
def test_schedule_values(schedule, ramp, expected):
    curriculum = Curriculum(mean=8, steps=100, schedule=schedule, ramp=ramp)
    assert {step: curriculum.mean_at(step) for step in expected} == expected


def test_schedules_are_the_papers_formulas():
    for step in range(1000):
        one = Curriculum(mean=32, steps=1000, schedule="1-sqrt").mean_at(step)
        expected = 32 * (1 - math.sqrt(max(0.0, 1 - step / 750)))
        assert one == max(1, math.ceil(expected - 1e-9))
        two = Curriculum(mean=32, steps=1000, schedule="linear").mean_at(step)
        assert two == max(1, math.ceil(min(1.0, step / 250) * 32 - 1e-9))


@pytest.mark.parametrize("mean", [1, 4, 32])
def test_poisson_lognormal_has_the_papers_mean_and_variance(mean):
    draws = 40000
    curriculum = Curriculum(mean=mean, steps=draws, sampler="poisson-lognormal", max=100 * mean, seed=7)
    samples = [curriculum.at(step).num_recurrences for step in range(draws)]
    # p - 1 is Poisson with a log-normal rate of mean r: variance r + r^2 (e^(sigma^2) - 1).
    variance = mean + mean**2 * (math.exp(0.25) - 1)
    assert statistics.mean(samples) == pytest.approx(mean + 1, abs=5 * math.sqrt(variance / draws))
    assert statistics.variance(samples) == pytest.approx(variance, rel=0.1)


def test_cap_bounds_the_tail_only():
    free, capped = (Curriculum(mean=4, steps=5000, sampler="poisson-lognormal", max=cap, seed=1) for cap in (10**6, 10))
    assert max(free.at(step).num_recurrences for step in range(5000)) > 10
    for step in range(5000):
        assert capped.at(step).num_recurrences == min(10, free.at(step).num_recurrences)


def test_extreme_rates_do_not_overflow():
    assert poisson_lognormal(500, 10**6, 1 - 1e-16, 0.5) > 500
    assert poisson_lognormal(1, 100, 1e-16, 0.5) == 1


def test_the_samples_are_these():
    """A run resumed under another Python or library version must not draw other recurrences."""
    curriculum = Curriculum(mean=4, steps=100, sampler="poisson-lognormal", seed=5)
    assert [curriculum.at(step).num_recurrences for step in range(12)] == [7, 3, 3, 8, 2, 1, 1, 6, 8, 13, 4, 4]


def test_uniforms_are_uniform():
    pairs = [uniforms(3, step) for step in range(4000)]
    for draws in zip(*pairs, strict=True):
        assert statistics.mean(draws) == pytest.approx(0.5, abs=0.025)
        assert statistics.variance(draws) == pytest.approx(1 / 12, rel=0.05)
    first, second = zip(*pairs, strict=True)
    assert abs(statistics.correlation(first, second)) < 0.08


def test_the_curriculum_needs_no_torch():
    code = "import sys, loopwise.train; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
