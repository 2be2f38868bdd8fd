"""`loopwise plot`: pictures of what a run will do, of what it did, and of what was measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopwise.arguments import Parser
from loopwise.directory import new_file
from loopwise.errors import UserError, reason
from loopwise.recipe import read_recipe, settled, validate

from .curriculum import Curriculum, capacities, curriculum_of
from .recipe import Train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_STEPS = 1000  # of a run whose recipe names no number of steps


def main(argv: list[str]) -> int:
    """Draw, into a file."""
    parser = Parser("loopwise plot", description="Pictures of a curriculum, of a training run, or of a measurement.")
    parser.add_argument(
        "what",
        choices=["curriculum", "run", "eval", "depth"],
        help="a recipe's curriculum; a run's log; right answers (or loss) by recurrences; recurrences by group",
    )
    parser.add_argument(
        "source",
        metavar="RECIPE|OUT|FILE",
        help="a recipe (name or file); the directory of a run; the file of loopwise eval --out (for depth, of a "
        "measurement with endpoint and group)",
    )
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings that replace the recipe's")
    parser.add_argument("--out", metavar="FILE", help="picture (default: curriculum.png, OUT/run.png, FILE.png)")
    args = parser.parse_intermixed_args(argv)
    file = draw(args)
    print(f"picture written to {file}")
    return 0


def draw(args: argparse.Namespace) -> Path:
    if args.what == "curriculum":
        file = Path(args.out or "curriculum.png")
        figure = curriculum_figure(*curriculum_of_recipe(args.source, args.settings))
    elif args.settings:
        raise UserError(
            f"{args.settings[0]!r}: what was measured has its settings; they belong to loopwise plot curriculum"
        )
    elif args.what == "run":
        from .plot_run import run_figure

        file = Path(args.out or Path(args.source) / "run.png")
        figure = run_figure(Path(args.source))
    else:
        from .plot_eval import depth_figure, eval_figure

        ending = ".depth.png" if args.what == "depth" else ".png"
        file = Path(args.out or Path(args.source).expanduser().with_suffix(ending))
        figure = (eval_figure if args.what == "eval" else depth_figure)(Path(args.source))
    try:
        with new_file(file) as partial:
            figure.savefig(partial, dpi=150, format=file.suffix[1:] or "png")
    except (OSError, ValueError) as error:  # a folder that is not there; a suffix that is no picture's
        raise UserError(f"--out {file}: {reason(error)}") from None
    return file


def curriculum_of_recipe(recipe: str, settings: list[str]) -> tuple[Curriculum, Train]:
    """What `recipe` with `settings` gives. Raises UserError for bad ones, and where a mean is missing."""
    values = settled(Train, read_recipe("train", recipe), settings)
    data = values.setdefault("data", {})
    if isinstance(data, dict) and not data.keys() & {"train", "phases"}:
        data["train"] = ["-"]  # recipes leave it to the user, and it is not read here
    checked = validate(Train, values)
    keys = checked.recurrence
    if keys is None or (keys.mean is None and keys.levels is None):
        raise UserError(f"{recipe}: it takes the mean from the model; set recurrence.mean=N to draw one")
    return curriculum_of(keys, keys.mean or 1, checked.steps or SHOWN_STEPS, checked.seed), checked


def curriculum_figure(curriculum: Curriculum, recipe: Train) -> Figure:
    """The mean, the sampled R and the recurrences with gradient against the step; how often each R occurs."""
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
        length = round(warmup * curriculum.mean.steps)
        top = curriculum.mean.top
        final = [(top - i) / top for i in range(top)]  # the default of mixture-of-recursions
        shares = [capacities(final, step, length) for step in steps]
        for i in range(top):
            label = f"recursion {i + 1}" if i in (0, top - 1) else None
            below.plot(steps, [share[i] for share in shares], color=str(0.7 * i / top), label=label)
        below.set_xlabel("step")
        below.set_ylabel("capacity (default shares)")
        below.legend(frameon=False)
    return figure


def histogram(axes: Any, sampled: list[int]) -> None:
    """How often each R occurred."""
    values = sorted(set(sampled))
    axes.bar(values, [sampled.count(value) for value in values], color="0.6")
    axes.set_xlabel("R")
    axes.set_ylabel("steps")
