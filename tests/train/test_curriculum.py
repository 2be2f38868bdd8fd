"""The curriculum: its values, its reproducibility, the distribution of its samples."""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.cli import main
from loopwise.errors import UserError
from loopwise.recipe import validate
from loopwise.train.curriculum import Curriculum, Depth, curriculum_of
from loopwise.train.data import Mixture
from loopwise.train.recipe import Recurrence, Train
from loopwise.train.recipe.recurrence import SAMPLERS
from loopwise.train.samplers import nested_depths, poisson_lognormal, truncated_poisson, uniforms
from loopwise.train.schedule import Schedule, capacities
from loopwise.unused import check_used
from tests.helpers.recipes import load

levels = st.dictionaries(st.floats(0, 1), st.integers(1, 64), max_size=4).map(
    lambda later: tuple(sorted({**later, 0.0: 1}.items()))
)


@st.composite
def schedules(draw, steps: int, end: int = 64) -> Schedule:
    kind = draw(st.sampled_from(["constant", "linear", "1-sqrt", "steps"]))
    values = draw(levels) if kind == "steps" else ()
    ramp = draw(st.none() | st.floats(0, 1)) if kind in ("linear", "1-sqrt") else None
    return Schedule(values[-1][1] if values else draw(st.integers(1, end)), steps, kind, ramp, values)


@st.composite
def curricula(draw) -> Curriculum:
    steps = draw(st.integers(1, 5000))
    low = draw(st.integers(1, 6))
    return Curriculum(
        mean=draw(schedules(steps)),
        sampler=draw(st.sampled_from(SAMPLERS)),
        min=low,
        max=draw(st.none() | st.integers(low, 80)),
        backprop=draw(st.none() | schedules(steps, 16)),
        seed=draw(st.integers(0, 2**40)),
    )


@given(curricula())
def test_what_a_model_was_trained_at(curriculum):
    trained = curriculum.trained()
    assert 1 <= trained["min"] <= trained["mean"] <= trained["max"] == curriculum.cap
    for step in range(0, curriculum.mean.steps, 97):
        assert trained["min"] <= curriculum.at(step).num_recurrences <= trained["max"]


@given(curricula(), st.data())
def test_depth_is_pure_and_within_bounds(curriculum, data):
    step = data.draw(st.integers(0, curriculum.mean.steps - 1))
    depth = curriculum.at(step)
    # Whatever was asked before: another object, asked only this, says the same.
    curriculum.at(data.draw(st.integers(0, curriculum.mean.steps - 1)))
    assert Curriculum(**vars(curriculum)).at(step) == depth == curriculum.at(step)
    low = 1 if curriculum.sampler == "fixed" else curriculum.min
    assert low <= depth.num_recurrences <= curriculum.cap
    if curriculum.backprop is None:
        assert depth.grad_recurrences is None
    else:
        assert depth.grad_recurrences == min(curriculum.backprop.at(step), depth.num_recurrences)
        if not curriculum.truncates:
            assert depth.grad_recurrences == depth.num_recurrences


@given(st.integers(1, 5000).flatmap(schedules))
def test_schedules_grow_to_their_end(schedule):
    means = [schedule.at(step) for step in range(0, schedule.steps, max(1, schedule.steps // 97))]
    assert min(means) >= 1
    assert max(means) <= schedule.top
    if schedule.kind != "steps":
        assert means == sorted(means)
        if (schedule.ramp or 0) <= 0.75 and schedule.steps >= 8:
            assert schedule.at(schedule.steps - 1) == schedule.end


@given(levels, st.integers(1, 3000))
def test_a_list_of_levels_is_a_staircase(values, steps):
    schedule = Schedule(values[-1][1], steps, "steps", None, values)
    for step in range(0, steps, max(1, steps // 50)):
        assert schedule.at(step) == dict(values)[max(share for share, _ in values if share * steps <= step + 1e-9)]


@pytest.mark.parametrize(
    ("kind", "ramp", "expected"),
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
def test_schedule_values(kind, ramp, expected):
    schedule = Schedule(8, 100, kind, ramp)
    assert {step: schedule.at(step) for step in expected} == expected


def test_schedules_are_the_papers_formulas():
    for step in range(1000):
        one = Schedule(32, 1000, "1-sqrt").at(step)
        expected = 32 * (1 - math.sqrt(max(0.0, 1 - step / 750)))
        assert one == max(1, math.ceil(expected - 1e-9))
        assert Schedule(32, 1000, "linear").at(step) == max(1, math.ceil(min(1.0, step / 250) * 32 - 1e-9))


def test_the_recipe_is_read_whole():
    keys = Recurrence.model_validate(
        {
            "schedule": "steps",
            "levels": {"0.5": 4, 0: 2},
            "sampler": "uniform",
            "min": 2,
            "backprop": 3,
            "backprop_schedule": "linear",
            "backprop_ramp": 0.5,
        }
    )
    assert Recurrence.model_validate(keys.model_dump(mode="json")) == keys
    curriculum = curriculum_of(keys, 1, 100, 3)
    assert curriculum == Curriculum(
        Schedule(4, 100, "steps", None, ((0.0, 2), (0.5, 4))), "uniform", 2, None, Schedule(3, 100, "linear", 0.5), 3
    )
    assert {curriculum.at(step).num_recurrences for step in range(50)} == {2}
    assert {curriculum.at(step).num_recurrences for step in range(50, 100)} == {2, 3, 4, 5, 6}
    assert [curriculum.at(step).grad_recurrences for step in (0, 20, 60)] == [1, 2, min(3, curriculum.at(60)[0])]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"schedule": "steps", "levels": {0.5: 2}}, "the first share is 0"),
        ({"schedule": "steps", "levels": {0: 2}, "mean": 2}, "mean=2 has no effect: recurrence.levels lists all"),
        ({"schedule": "steps", "levels": 3}, "a mapping from shares"),
        ({"schedule": "steps", "levels": {None: 2}}, "the keys are shares of the run"),
        ({"schedule": "steps", "levels": {0: 2, "half": 4}}, "the keys are shares of the run"),
        (
            {"backprop_levels": {0: 2}},
            "backprop_levels=.* it belongs to recurrence.backprop_schedule=steps",
        ),
    ],
)
def test_bad_levels(keys, message):
    with pytest.raises(ValueError, match=message):
        check_used(Recurrence.model_validate(keys))


def test_a_least_recurrence_above_the_mean_leaves_uniform_nothing_to_draw():
    keys = Recurrence.model_validate({"sampler": "uniform", "min": 5})
    with pytest.raises(UserError, match=r"recurrence.min=5 is above the mean of 2 recurrences"):
        curriculum_of(keys, 2, 10, 0)
    with pytest.raises(UserError, match=r"data.phases.1.recurrence.min=5 is above the mean of 2"):
        phased(10, [0.5, 0.5], [{"mean": 1}, {"sampler": "uniform", "min": 5, "mean": 2}])


OWN = [{"mean": 1, "max": 6}, {"mean": 3, "sampler": "uniform", "min": 2}, None, {"mean": 9, "backprop": 2}]
SHARES = [0.2, 0.1, 0.15, 0.55]


def phased(steps: int, shares: list[float], own: list[dict | None], seed: int = 0, **section) -> Curriculum:
    """The curriculum of a recipe with these phases."""
    phases = [
        {"share": share, "sources": {f"{i}.txt": 1}, "recurrence": keys}
        for i, (share, keys) in enumerate(zip(shares, own, strict=True))
    ]
    recipe = validate(Train, {"data": {"phases": phases}, "recurrence": section or None, "steps": steps, "seed": seed})
    check_used(recipe)
    keys = recipe.recurrence or Recurrence()
    return curriculum_of(keys, keys.mean or 5, steps, seed, recipe.data.recurrence_by_phase())


@given(st.integers(20, 2000), st.integers(0, 2**32 - 1))
def test_each_phase_has_a_curriculum_of_its_own(steps, seed):
    """Every step has the R of the phase that the data take its samples from."""
    section = {"sampler": "truncated-poisson", "mean": 4, "min": 1, "max": 12}
    curriculum = phased(steps, SHARES, OWN, seed, **section)
    keys = [Recurrence.model_validate({**section, **(own or {})}) for own in OWN]
    alone = [curriculum_of(one, one.mean or 0, steps, seed) for one in keys]
    phases = [(share, [float(i == j) for j in range(4)]) for i, share in enumerate(SHARES)]
    sources = Mixture([50] * 4, phases, 3 * steps, seed).chosen
    depths = [curriculum.at(step) for step in range(steps)]
    inside = [step for step in range(steps) if len({*sources[3 * step : 3 * step + 3]}) == 1]
    assert len(inside) >= steps - 3
    assert [depths[step] for step in inside] == [alone[sources[3 * step]].at(step) for step in inside]
    trained = curriculum.trained()
    assert trained == {"mean": 9, "min": 1, "max": 12}
    assert all(1 <= depth.num_recurrences <= curriculum.cap == 12 for depth in depths)
    assert curriculum.deepest() == Depth(12, None)
    assert curriculum.truncates
    assert [curriculum.mean.at(round(share * steps + 1)) for share in (0, 0.2, 0.3, 0.45)] == [1, 3, 4, 9]


@pytest.mark.parametrize("seed", range(3))
def test_phases_are_the_levels_of_the_shipped_recipe(seed):
    """Its levels, written into its phases, give every step the same R."""
    shipped = load("train", recipe="hops")
    starts, means = zip(*shipped.recurrence.levels, strict=True)
    shares = [phase.share for phase in shipped.data.phases]
    assert list(starts) == pytest.approx([0, *accumulate(shares[:-1])])
    section = {"sampler": "poisson-lognormal", "min": 2, "max": 16}
    new = phased(1000, shares, [{"mean": mean} for mean in means], seed, **section)
    old = curriculum_of(shipped.recurrence, 8, 1000, seed)
    assert [new.at(step) for step in range(1000)] == [old.at(step) for step in range(1000)]
    assert (new.trained(), new.deepest(), new.mean) == (old.trained(), old.deepest(), old.mean)


@pytest.mark.parametrize(
    ("section", "own", "message"),
    [
        ({"schedule": "steps", "levels": {0: 2}}, {"mean": 2}, "recurrence.schedule=steps and the recurrence of data"),
        ({"schedule": "1-sqrt"}, {"max": 2}, "recurrence.schedule=1-sqrt and the recurrence of data.phases both"),
        ({"backprop": 4, "backprop_schedule": "linear"}, {"mean": 2}, "recurrence.backprop_schedule=linear and"),
        ({}, {"mean": 2, "max": 4}, "data.phases.0.recurrence.max=4 has no effect: it bounds a sampled R"),
        ({"sampler": "uniform"}, {"mean": 5, "max": 4}, "data.phases.0.recurrence: max=4 is below mean=5"),
        ({"sampler": "uniform", "min": 3}, {"max": 2}, "data.phases.0.recurrence: max=2 is below min=3"),
        ({"sampler": "uniform"}, {"max": 4}, "data.phases.0.recurrence.max=4 is below the mean of 5 recurrences"),
        ({"mean": 3}, {"mean": 2}, "recurrence.mean=3 has no effect: every phase has its own recurrence.mean"),
        ({"min": 3}, {"mean": 2}, "recurrence.min=3 has no effect: it bounds a sampled R"),
        ({}, {"levels": {0: 2}}, "recipe key"),
    ],
)
def test_phases_that_contradict_the_section(section, own, message):
    with pytest.raises(UserError, match=re.escape(message)):
        phased(10, [0.5, 0.5], [own, {"mean": 2}], **section)


def samples(mean: int, draws: int, sampler: str, **bounds) -> list[int]:
    curriculum = Curriculum(Schedule(mean, draws), sampler, seed=7, **bounds)
    return [curriculum.at(step).num_recurrences for step in range(draws)]


@given(st.integers(1, 64), st.integers(1, 20), st.integers(0, 60), st.floats(1e-9, 1 - 1e-9))
def test_truncated_poisson_inverts_its_distribution(rate, low, width, uniform):
    high = low + width
    inside = [math.exp(-rate) * rate**k / math.factorial(k) for k in range(low, high + 1)]
    drawn = truncated_poisson(rate, low, high, uniform)
    assert low <= drawn <= high
    total = sum(inside)
    if total > 1e-300:
        assert sum(inside[: drawn - low]) / total <= uniform + 1e-9
        assert uniform <= sum(inside[: drawn - low + 1]) / total + 1e-9


def test_uniform_sampler_is_uniform():
    drawn = samples(4, 20000, "uniform", min=2, max=9)
    assert set(drawn) == set(range(2, 10))
    assert all(abs(drawn.count(value) / 20000 - 1 / 8) < 0.01 for value in range(2, 10))
    assert set(samples(4, 2000, "uniform")) == set(range(1, 8))  # around the mean


@given(st.integers(0, 2**32), st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 8))
def test_nested_depths_are_a_random_subset(seed, step, recurrences, count):
    depths = nested_depths(seed, step, recurrences, count)
    assert depths == sorted(set(depths)) == nested_depths(seed, step, recurrences, count)
    assert len(depths) == min(count, recurrences)
    assert set(depths) <= set(range(1, recurrences + 1))


def test_nested_depths_cover_all_equally():
    chosen = [depth for step in range(4000) for depth in nested_depths(0, step, 8, 2)]
    assert all(abs(chosen.count(depth) / 8000 - 1 / 8) < 0.015 for depth in range(1, 9))


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(0, 500), st.integers(1, 500))
def test_capacity_falls_from_one(final, step, warmup):
    now, later = capacities(final, step, warmup), capacities(final, step + 1, warmup)
    assert capacities(final, 0, warmup) == [1.0] * len(final)
    assert capacities(final, warmup, warmup) == final
    for last, a, b in zip(final, now, later, strict=True):
        assert last - 1e-12 <= b <= a + 1e-12 <= 1 + 1e-12
    half = capacities([0.5], warmup, 2 * warmup)[0]
    assert half == pytest.approx(0.75)


@pytest.mark.parametrize("mean", [1, 4, 32])
def test_poisson_lognormal_has_the_papers_mean_and_variance(mean):
    draws = 40000
    drawn = samples(mean, draws, "poisson-lognormal", max=100 * mean)
    # p - 1 is Poisson with a log-normal rate of mean r: variance r + r^2 (e^(sigma^2) - 1).
    variance = mean + mean**2 * (math.exp(0.25) - 1)
    assert statistics.mean(drawn) == pytest.approx(mean + 1, abs=5 * math.sqrt(variance / draws))
    assert statistics.variance(drawn) == pytest.approx(variance, rel=0.1)


def test_cap_bounds_the_tail_only():
    free, capped = (samples(4, 5000, "poisson-lognormal", max=cap) for cap in (10**6, 10))
    assert max(free) > 10
    assert capped == [min(10, depth) for depth in free]


def test_extreme_rates_do_not_overflow():
    assert poisson_lognormal(500, 10**6, 1 - 1e-16, 0.5) > 500
    assert poisson_lognormal(1, 100, 1e-16, 0.5) == 1


def test_the_samples_are_these():
    """A run resumed with another Python or library version must draw the same recurrences."""
    expected = {
        "poisson-lognormal": [7, 3, 3, 8, 2, 1, 1, 6, 8, 13, 4, 4],
        "truncated-poisson": [7, 4, 3, 5, 3, 1, 2, 3, 5, 5, 3, 4],
        "uniform": [7, 4, 2, 6, 3, 1, 2, 3, 6, 5, 3, 4],
    }
    for sampler, depths in expected.items():
        curriculum = Curriculum(Schedule(4, 100), sampler, seed=5)
        assert [curriculum.at(step).num_recurrences for step in range(12)] == depths, sampler


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


def test_a_curriculum_is_drawn(tmp_path, capsys):
    from PIL import Image

    file = tmp_path / "picture.png"
    settings = ["recurrence.mean=6", "recurrence.capacity_warmup=0.5", "steps=50"]
    assert main(["plot", "curriculum", "retrofit", *settings, "--out", str(file)]) == 0
    assert Image.open(file).size[0] > 800
    refused = {
        "recursive": "its mean comes from the model; set recurrence.mean=N",
        "nowhere": "unknown train recipe 'nowhere'",
    }
    for recipe, message in refused.items():
        assert main(["plot", "curriculum", recipe, "--out", str(tmp_path / "other.png")]) == 2
        assert message in capsys.readouterr().err
    assert main(["plot", "curriculum", "retrofit", "--out", str(tmp_path / "nowhere" / "a.png")]) == 2
    assert "--out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_a_run_is_drawn(recurrent, plain, command, tmp_path, capsys):
    from PIL import Image

    from loopwise.evaluation.plot.run import by_depth, sampled_recurrences, series
    from tests.helpers.train_tiny import RECURRENCE, history, run

    out = tmp_path / "out"
    settings = ["steps=8", "eval_every=4", "data.eval_fraction=0.1", "log_every=1", "recurrence.eval_at=1,4"]
    run(command(recurrent, out, *settings, *RECURRENCE))
    assert "GFLOP/s" in capsys.readouterr().out
    state, kept = (json.loads((out / name).read_text()) for name in ("trainer_state.json", "run.json"))
    assert sampled_recurrences(kept["run"], state) == history(out, "num_recurrences")
    log = state["log_history"]
    assert by_depth(log, "eval_loss") == [("eval_loss_r1", "R = 1"), ("eval_loss_r4", "R = 4")]
    assert series(log, "eval_loss_r4")[0] == [4, 8]
    assert {name for record in log for name in record if "state_change" in name} == {
        f"state_change_r{r}" for r in (2, 3, 4)
    }
    assert main(["plot", "run", str(out)]) == 0
    assert Image.open(out / "run.png").size[0] > 1000
    run(command(plain, tmp_path / "plain", "steps=2"))
    assert main(["plot", "run", str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    assert main(["plot", "run", str(tmp_path)]) == 2
    assert "no training run in it" in capsys.readouterr().err
    assert main(["plot", "run", str(out), "steps=3"]) == 2
