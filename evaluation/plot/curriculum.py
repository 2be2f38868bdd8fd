"""A curriculum as a picture: R, its mean and the recurrences with gradient, against the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import UserError
from ...recipe import read_recipe, settled, validate
from ...train.curriculum import Curriculum, curriculum_of
from ...train.recipe import Recurrence, Train
from ...train.schedule import capacities

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEFAULT_STEPS = 1000  # for a recipe without `steps`


def curriculum_of_recipe(recipe: str, settings: list[str]) -> tuple[Curriculum, Train]:
    """The curriculum of `recipe` with `settings`, and the validated recipe.

    Raises UserError for bad settings, and for a recipe without a mean.
    """
    values = settled(Train, read_recipe("train", recipe), settings)
    data = values.setdefault("data", {})
    if isinstance(data, dict) and not data.keys() & {"train", "phases"}:
        data["train"] = ["-"]  # required by the recipe, but not read here
    checked = validate(Train, values)
    keys, phases = checked.recurrence or Recurrence(), checked.data.recurrence_by_phase()
    if keys.mean is None and keys.levels is None and not all(own and own.mean for _, own in phases):
        raise UserError(f"{recipe}: its mean comes from the model; set recurrence.mean=N to draw one")
    return curriculum_of(keys, keys.mean or 1, checked.steps or DEFAULT_STEPS, checked.seed, phases), checked


def curriculum_figure(curriculum: Curriculum, recipe: Train) -> Figure:
    """The mean, the sampled R and the recurrences with gradient against the step, and a histogram of R."""
    from matplotlib.figure import Figure

    steps = range(curriculum.mean.steps)
    depths = [curriculum.at(step) for step in steps]
    sampled = [depth.num_recurrences for depth in depths]
    warmup = (recipe.recurrence and recipe.recurrence.capacity_warmup) or 0.0
    figure = Figure(figsize=(9, 6 if warmup else 4), layout="constrained")
    left, right = (axes := figure.subplots(2 if warmup else 1, 2, width_ratios=[3, 1], squeeze=False))[0]
    left.plot(steps, sampled, ".", markersize=2, color="0.6", label=f"R ({curriculum.sampler})")
    left.plot(steps, [curriculum.mean.at(step) for step in steps], color="C3", label=f"mean ({curriculum.mean.kind})")
    if curriculum.backprop:
        label = "with gradient, at most"
        left.plot(steps, [curriculum.backprop.at(step) for step in steps], "--", color="C0", label=label)
    left.set_xlabel("step")
    left.set_ylabel("recurrences")
    left.legend(frameon=False)
    histogram(right, sampled)
    if warmup:
        below, empty = axes[1]
        empty.set_axis_off()
        _plot_capacities(below, curriculum, warmup)
    return figure


def _plot_capacities(axes: Axes, curriculum: Curriculum, warmup: float) -> None:
    """The default capacities of an expert-choice router over the run. warmup: share of the steps."""
    steps, top = range(curriculum.mean.steps), curriculum.mean.top
    length = round(warmup * curriculum.mean.steps)
    final = [(top - i) / top for i in range(top)]  # the default of mixture-of-recursions
    shares = [capacities(final, step, length) for step in steps]
    for i in range(top):
        label = f"recursion {i + 1}" if i in (0, top - 1) else None
        axes.plot(steps, [share[i] for share in shares], color=str(0.7 * i / top), label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("capacity (default shares)")
    axes.legend(frameon=False)


def histogram(axes: Axes, sampled: list[int]) -> None:
    """Draw how often each R occurs among `sampled`."""
    values = sorted(set(sampled))
    axes.bar(values, [sampled.count(value) for value in values], color="0.6")
    axes.set_xlabel("R")
    axes.set_ylabel("steps")
