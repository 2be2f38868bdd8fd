"""The page of all results that have finished."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from . import curriculum, decoders, depth, gained, relaxed, routing
from .chains import Size
from .commands import Commands

MISSING = {
    "a": ("(a) Recovering what tying took away", "make results-real"),
    "b": ("(b) A curriculum of recurrences", "make results"),
    "c": ("(c) Chains of assignments: what depth buys", "make results"),
    "d": ("(d) Mixture-of-Recursions against fixed recursion", "make results"),
    "e": ("(e) Decoders with several positions in flight", "make results"),
    "f": ("(f) Depth in a real model", "python -m bench.gained make MODEL OUT"),
}


def machine() -> str:
    """The processor, as Linux names it, and its cores."""
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0].partition(":")[2].strip() if names else "this machine"
    return f"{os.cpu_count()} cores of {name}"


def write(at: Commands, size: Size, real: Size, source: Path, report: Path, images: Path) -> list[str]:
    """Write the page `report` and its pictures. Returns the letters of results that have not finished."""
    images.mkdir(parents=True, exist_ok=True)
    link = os.path.relpath(images, report.parent)
    sections: dict[str, Callable[[], list[str]]] = {
        "a": lambda: relaxed.lines(at, real, source, images, link),
        "b": lambda: curriculum.lines(at, size),
        "c": lambda: depth.lines(at, size, images, link),
        "d": lambda: routing.lines(at, size),
        "e": lambda: decoders.lines(at, size),
        "f": lambda: gained.lines(at, images, link),
    }
    found, missing = [], []
    for letter, section in sections.items():
        try:
            found += section()
        except FileNotFoundError:
            missing.append(letter)
            title, command = MISSING[letter]
            found += [f"## {title}", "", f"Not measured yet: `{command}`.", ""]
    seeds = f"{len(size.seeds)} seeds" if len(size.seeds) > 1 else "1 seed"
    shortened = "" if size.share == 1 else f" **Steps are {size.share:g} times those of the page: no results.**"
    head = [
        "# Results of training",
        "",
        "Written by `make results` and `make results-real` (`bench/results/`) from the files of their runs; every "
        f"step is a `loopwise` command. {seeds.capitalize()} where nothing else is said, of weights, order of data and "
        "recurrences; generated records are the same. A claim holds where it does in every seed. FLOPs count 6 a "
        "trained parameter and token, without attention scores. Most models are small, and runs short: they say how "
        "methods compare here, not at the papers' sizes. Times are those of all attempts, two commands at once on "
        f"{machine()}.{shortened}",
        "",
    ]  # fmt: skip
    report.write_text("\n".join([*head, *found]).rstrip() + "\n", encoding="utf-8")
    return missing
