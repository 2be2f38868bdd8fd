"""Training FLOPs as run.json records them, and the steps that cost as much as another run."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from loopwise.recipe import load_recipe
from loopwise.train.fitting import curriculum
from loopwise.train.measure import Costs, parameter_costs, step_flops
from loopwise.train.objectives import Objective
from loopwise.train.optimisers import freeze
from loopwise.train.pretrained import load_config, load_model
from loopwise.train.recipe import Train

LOADING = threading.Lock()
KNOWN: dict[tuple[Path, str], Costs] = {}


def spent(run: Path) -> float:
    """Training FLOPs of a finished run."""
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["spent"]["flops"]


def costs(model: Path, recipe: Train | None = None) -> Costs:
    """`parameter_costs` of the checkpoint `model`, with what `recipe` freezes.

    Threads take turns: loading by transformers is not made for them.
    """
    key = model, recipe.model_dump_json(include={"optimiser", "objectives"}) if recipe else ""
    with LOADING:
        if key not in KNOWN:
            loaded = load_model(str(model))
            if recipe:
                freeze(loaded, recipe.optimiser, recipe.objectives, False)
            KNOWN[key] = parameter_costs(loaded)
        return KNOWN[key]


def price(model: Path, arguments: list[str], steps: int) -> float:
    """FLOPs that `loopwise train MODEL OUT ARGUMENTS steps=..` will cost."""
    named = [word for word in arguments if word.startswith("--recipe=")]
    settings = [word for word in arguments if not word.startswith("--")]
    name = named[0].partition("=")[2] if named else None
    recipe = load_recipe(Train, "train", name, [*settings, f"steps={steps}"])
    config = load_config(str(model), None)
    course, of_token = curriculum(config, recipe, steps), costs(model, recipe)
    warmup = round(((recipe.recurrence and recipe.recurrence.capacity_warmup) or 0) * steps)
    objective = Objective(recipe.objectives, config, None, steps, recipe.seed, warmup)
    tokens = recipe.batch_size * recipe.gradient_accumulation * recipe.data.sequence_length
    each = (step_flops(of_token, objective, s, course.at(s) if course else None) for s in range(steps))
    return tokens * float(sum(each))


def steps_worth(model: Path, arguments: list[str], flops: float) -> int:
    """The number of steps of `loopwise train MODEL OUT ARGUMENTS` that costs nearest to `flops`."""
    steps = 8
    for _ in range(20):  # the price of a step may depend on the length of the run
        better = max(1, round(steps * flops / price(model, arguments, steps)))
        if better == steps:
            break
        steps = better
    return steps
