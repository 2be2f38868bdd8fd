"""(f) Depth in a real model: the files of a finished run, as `python -m bench.gained` makes them.

The folder of the run has these results of `loopwise eval --out`, of the trained model where nothing else is said:

    chains.json    right answers on chains, group=hops, at several num_recurrences
    text.json      loss on held-out text, at num_recurrences 1 to 8
    source.json    the source's loss on that text
    plain.json     optional: loss on that text of the plain model after the same FLOPs
    run.json       the training run's
    commands.sh    the commands that made them
"""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import pictures
from .commands import Commands, Failed, read
from .markdown import block, judged, table

NEEDED = ("chains.json", "text.json", "source.json", "run.json", "commands.sh")
OPTIONAL = ("plain.json",)
POINTS, NATS = 20, 0.05  # what 2 hops must gain at R = 2, and what text may lose
RISING = (1, 2, 4, 8)


def take(at: Commands, folder: Path) -> None:
    """Copy the files of a finished run into OUT. Raises Failed for a folder that lacks some."""
    if lacking := [file for file in NEEDED if not (folder / file).is_file()]:
        raise Failed(f"{folder}: no {lacking[0]} in it; a finished run has {', '.join(NEEDED)}")
    kept = at.out / "gained"
    kept.mkdir(exist_ok=True)
    for file in (*NEEDED, *OPTIONAL):
        if (folder / file).is_file():
            shutil.copy2(folder / file, kept / file)


def lines(at: Commands, images: Path, link: str) -> list[str]:
    """The section. Raises FileNotFoundError where no run was taken."""
    kept = at.out / "gained"
    answers, text, source = (read(kept / file) for file in ("chains.json", "text.json", "source.json"))
    run = read(kept / "run.json")
    groups = list(answers["results"][0]["groups"])
    rows = [
        [f"R = {row['num_recurrences']}", *(f"{100 * row['groups'][group]['accuracy']:.1f}" for group in groups),
         f"{100 * row['accuracy']:.1f}"]
        for row in answers["results"]
    ]  # fmt: skip
    level = source["results"][0]["loss"]
    losses = [["the source", f"{level:.4f}", ""]]
    if (kept / "plain.json").is_file():
        plain = read(kept / "plain.json")["results"][0]["loss"]
        losses.append(["plain, the same FLOPs", f"{plain:.4f}", f"{plain - level:+.4f}"])
    losses += [
        [
            f"R = {row['num_recurrences']}",
            f"{row['loss']:.4f} ± {row['loss_error'] or 0:.4f}",
            f"{row['loss'] - level:+.4f}",
        ]
        for row in text["results"]
    ]
    pictures.drawn("eval", kept / "chains.json", images / "results-real.png")
    commands = (kept / "commands.sh").read_text().strip().splitlines()
    return [
        "## (f) Depth in a real model",
        "",
        f"`{source['model']}` learned text and chains of assignments "
        f"({run['spent']['tokens']:,.0f} tokens, {run['spent']['flops']:.2e} FLOPs; one seed). Right answers in %, by "
        "hops:",
        "",
        *table(["hops", *groups, "all"], rows),
        f"![Right answers by hops and R]({link}/results-real.png)",
        "",
        "Loss on held-out text, nats a token, with standard errors:",
        "",
        *table(["", "loss", "above the source"], losses),
        *_claims(answers, text, level),
        "",
        *block("hours, or a GPU", commands),
    ]


def _claims(answers: dict[str, Any], text: dict[str, Any], level: float) -> list[str]:
    found = []
    cell = {row["num_recurrences"]: row["groups"].get("2", {}).get("accuracy") for row in answers["results"]}
    if cell.get(1) is not None and cell.get(2) is not None:
        gain = 100 * (cell[2] - cell[1])
        found.append(
            judged(f"2 hops at R = 2 are {POINTS} points above R = 1", [gain >= POINTS], f"{gain:+.1f} points")
        )
    whole = {row["num_recurrences"]: 100 * row["accuracy"] for row in answers["results"]}
    if whole.keys() >= {*RISING}:
        steps = [after - before for before, after in pairwise(whole[depth] for depth in RISING)]
        first, last = whole[RISING[0]], whole[RISING[-1]]
        found.append(
            judged(
                f"Right answers, all hops together, rise with each of R = {', '.join(map(str, RISING))}",
                [all(step > 0 for step in steps)],
                f"from {first:.1f} to {last:.1f} %, by {', '.join(f'{step:+.1f}' for step in steps)} points",
            )
        )
    worst = max(row["loss"] - level for row in text["results"])
    depths = ", ".join(str(row["num_recurrences"]) for row in text["results"])
    found.append(
        judged(
            f"The loss on text stays within {NATS} of the source at R = {depths}",
            [worst <= NATS],
            f"at most {worst:+.4f}",
        )
    )
    return found
