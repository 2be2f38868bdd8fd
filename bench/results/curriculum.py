"""(b) Difficulty and recurrences that grow together, or not, at equal FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import chains
from .chains import Size
from .commands import Commands, read
from .costs import spent, steps_worth
from .markdown import block, claim, minutes, spread, table

STRAIGHT = chains.phases(lambda source: source, last_only=True)
FULL = ["recurrence.schedule=constant", "recurrence.levels=null", "recurrence.mean=9"]
# Beside the recipe itself, in which both grow.
ARMS = {"data": FULL, "none": [STRAIGHT, *FULL]}
NAMES = {
    "hops": "both grow (recipe `hops`)",
    "data": "hops grow, R has mean 9 from the start",
    "none": "1 to 8 hops and R of mean 9 from the start",
}


def tasks(at: Commands, size: Size) -> list[Callable[[], Any]]:
    """Runs after those of `chains.retrofitted`, whose FLOPs they have."""
    return [lambda arm=arm, seed=seed: _run(at, size, arm, seed) for arm in ARMS for seed in size.seeds]


def _run(at: Commands, size: Size, arm: str, seed: int) -> None:
    model, settings = f"chains/base-converted-{seed}", ["--recipe=hops", *ARMS[arm]]
    flops = spent(at.out / f"chains/hops-{seed}")
    steps = steps_worth(at.out / model, [*settings, f"seed={seed}"], flops)
    made = f"chains/grown-{arm}-{seed}"
    chains.train(at, made, model, settings, steps, seed)
    chains.measure(at, size, made, (1, 2, 4, 8, 16))


def lines(at: Commands, size: Size) -> list[str]:
    """The section. Raises FileNotFoundError where a run has not finished."""
    names = {"hops": "chains/hops"} | {arm: f"chains/grown-{arm}" for arm in ARMS}
    found = {arm: [read(at.out / f"{name}-{seed}.json") for seed in size.seeds] for arm, name in names.items()}
    top = {arm: [chains.rights(one, chains.TRAINED) for one in each] for arm, each in found.items()}
    columns = [chains.HOPS.index(hops) for hops in (1, 2, 4, 8)]
    rows = []
    for arm, each in top.items():
        steps = [read(at.out / f"{names[arm]}-{seed}/run.json")["spent"]["steps"] for seed in size.seeds]
        cells = [spread([of[place] for of in each]) for place in (*columns, -1)]
        first = spread([chains.rights(one, 1)[-1] for one in found[arm]])
        rows.append([NAMES[arm], f"{round(sum(steps) / len(steps)):,}", *cells, first])
    whole = {arm: [of[-1] for of in each] for arm, each in top.items()}
    return [
        "## (b) A curriculum of recurrences",
        "",
        "Chains of assignments again: the converted base of (c) learns up to 8 hops. The recipe `hops` holds 1 and 2 "
        "hops at R = 2 to 3, and then adds a hop a phase while R grows. The other two have R of mean 9 from the start, "
        "and one of them all hops as well, for the same FLOPs. Right answers in % at R = 8, mean ± standard deviation "
        f"over seeds ({minutes(at.seconds('chains/grown'))} of one core beside those of (c)):",
        "",
        *table(["", "steps", "1 hop", "2", "4", "8", "all, R = 8", "all, R = 1"], rows),
        claim("Growing both beats R of mean 9 from the start", whole["hops"], whole["data"]),
        claim("Growing both beats growing neither", whole["hops"], whole["none"]),
        "",
        *block("many minutes; tests/test_results.py runs them with fewer steps", [
            at.line(f"chains/grown-{arm}-{size.seeds[0]}") for arm in ARMS
        ]),
    ]  # fmt: skip
