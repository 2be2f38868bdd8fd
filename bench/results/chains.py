"""Chains of assignments: the sizes of an experiment, its base models, and right answers by hops."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .commands import Commands, read, write

RECIPES = Path(__file__).parents[2] / "recipes" / "train"
HOPS = [0, 1, 2, 3, 4, 6, 8, 10, 12, 16]  # 0: a lookup; more than 8 are never trained
DEPTHS = [1, 2, 3, 4, 6, 8, 16, 32]
TRAINED = 8  # hops, and the depth that solves them


@dataclass(frozen=True)
class Size:
    """How long everything is. seeds: numbers from 0.   share: of all steps.   records: held-out problems a group."""

    seeds: tuple[int, ...] = (0, 1, 2)
    share: float = 1.0
    records: int = 200

    def steps(self, count: int) -> int:
        return max(4, round(count * self.share))

    def of(self, name: str) -> int:
        """The steps of the recipe `name`."""
        return self.steps(recipe(name)["steps"])


TINY = Size(seeds=(0,), share=0.001, records=2)


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))


def train(at: Commands, made: str, model: str, arguments: Sequence[str], steps: int, seed: int) -> Path:
    """A training run, of which a checkpoint is kept six times."""
    often = [f"save_every={max(1, steps // 6)}", "keep_checkpoints=1", f"log_every={max(1, steps // 20)}"]
    return at.run(made, "train", model, made, *arguments, f"seed={seed}", f"steps={steps}", *often)


def untrained(at: Commands, name: str, seed: int, tokenizer: str, *settings: str) -> str:
    """A model of random weights, other ones for each seed. Returns its name."""
    made = f"{name}-{seed}"
    at.run(made, "init", tokenizer, made, *settings, f"seed={seed}")
    return made


def base(at: Commands, size: Size, seed: int) -> Path:
    """A plain model of 2 layers that has learned lookups: recipe `hops-base`."""
    empty = untrained(at, "chains/empty", seed, "task:hops")
    return train(at, f"chains/base-{seed}", empty, ["--recipe=hops-base"], size.of("hops-base"), seed)


def converted(at: Commands, seed: int, of: str = "base") -> Path:
    made = f"chains/{of}-converted-{seed}"
    settings = ["sizes=1,1,0", "injection=linear", "num_recurrences=8"]
    return at.run(made, "convert", f"chains/{of}-{seed}", made, *settings)


def retrofitted(at: Commands, size: Size, seed: int) -> Path:
    """The base, converted and trained by the recipe `hops`."""
    model = f"chains/base-converted-{seed}"
    return train(at, f"chains/hops-{seed}", model, ["--recipe=hops"], size.of("hops"), seed)


def phases(change: Callable[[str], str], last_only: bool = False, of: str = "hops", recurrence: bool = True) -> str:
    """The phases of the recipe `of` with other sources, as a setting. recurrence: keep what they say of it.

    last_only: the sources of the last phase from the first step on, but for those of fewer hops.
    """
    found = recipe(of)["data"]["phases"]
    if last_only:
        found = [{"share": 1, "sources": {list(found[-1]["sources"])[-1]: 1}}]
    for phase in found:
        if not recurrence:
            phase.pop("recurrence", None)
        phase["sources"] = {change(source): weight for source, weight in phase["sources"].items()}
    return f"data.phases={json.dumps(found)}"


def asked(size: Size, hops: Sequence[int] = tuple(HOPS)) -> str:
    numbers = "+".join(map(str, hops))
    return f"data=task:hops?hops={numbers}&lookups=0&questions=1&statements=18&records={size.records * len(hops)}"


def measure(at: Commands, size: Size, model: str, depths: Sequence[int] | None = tuple(DEPTHS)) -> dict[str, Any]:
    """Right answers of `model` by hops, at each of `depths`; None: of a plain model."""
    more = [f"num_recurrences={','.join(map(str, depths))}"] if depths else []
    return read(at.run(f"{model}.json", "eval", model, asked(size), "group=hops", *more, "--out", f"{model}.json"))


def rights(result: dict[str, Any], depth: int | None = None) -> list[float]:
    """Right answers in % of each group and of all, at `depth`; None: of the only row."""
    row = next(row for row in result["results"] if depth in (None, row["num_recurrences"]))
    return [100 * cell["accuracy"] for cell in (*row["groups"].values(), row)]


def pooled(results: Sequence[dict[str, Any]], name: str, file: Path) -> Path:
    """The answers of several seeds to the same problems as one result of `loopwise eval`, for `loopwise plot eval`.

    Its standard errors are those of the problems and of the seeds together.
    """
    rows = []
    for of_depth in zip(*(result["results"] for result in results), strict=True):
        groups = {}
        for group in of_depth[0]["groups"]:
            cells = [row["groups"][group] for row in of_depth]
            shares, count = [cell["accuracy"] for cell in cells], cells[0]["answers"]
            share = statistics.mean(shares)
            between = statistics.variance(shares) / len(shares) if shares[1:] else 0.0
            error = math.sqrt(share * (1 - share) / count + between)
            groups[group] = {"accuracy": share, "accuracy_error": error, "answers": count}
        rows.append({"num_recurrences": of_depth[0]["num_recurrences"], "groups": groups})
    write(file, {"model": name, "group": "hops", "results": rows})
    return file
