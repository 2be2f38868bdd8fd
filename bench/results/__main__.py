"""`python -m bench.results`: see the package."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from loopwise.errors import UserError

from . import curriculum, decoders, depth, gained, page, relaxed, routing, text
from .chains import TINY, Size
from .commands import Commands, Failed, alone, read

SMALL = "bcde"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.results", description="The results of docs/results.md.")
    parser.add_argument(
        "what",
        nargs="?",
        default="small",
        choices=["small", "real", "report"],
        help="results to make, or the page alone",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="folder of all runs")
    parser.add_argument("--only", default=SMALL, help="letters of the results of `small`: b, c, d, e")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="few steps and one seed: does it run at all?")
    parser.add_argument("--share", type=float, help="multiplies all steps; pages come from runs of 1")
    parser.add_argument("--text", type=Path, help="a text file or a folder; default Python's own library")
    parser.add_argument("--model", type=Path, help="source of (a); default SmolLM2-135M-Instruct, downloaded once")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="put the finished run in FOLDER into (f)")
    parser.add_argument("--report", type=Path, help="default docs/results.md; with --tiny or --share, OUT/results.md")
    parser.add_argument("--images", type=Path, help="folder of the pictures; default images beside the report")
    args = parser.parse_args(argv)
    args.report = args.report or (args.out / "results.md" if args.tiny or args.share else Path("docs/results.md"))
    args.images = args.images or args.report.parent / "images"
    return args


def small(at: Commands, size: Size, letters: str) -> None:
    """(b) to (e). What others build on comes first, long runs before short ones, speeds last and alone."""
    first: list[Callable[[], Any]] = []
    if {*letters} & {*"bc"}:
        first += [lambda seed=seed: depth.bases(at, size, seed) for seed in size.seeds]
    if "d" in letters:
        routing.prepare(at, size)
        first += routing.tuning(at, size)
    at.together(first)
    then = depth.tasks(at, size) if "c" in letters else []
    then += routing.others(at, size) if "d" in letters else []
    then += curriculum.tasks(at, size) if "b" in letters else []
    if "e" in letters:
        then += decoders.tasks(at, size)
    at.together(then)
    if "c" in letters:
        depth.alone(at, size)
    if "e" in letters:
        decoders.alone(at, size)


def real(at: Commands, size: Size, source: Path, tiny: bool) -> None:
    """(a): one run after the other, with all threads."""
    relaxed.few(at.out / "text")
    relaxed.prepare(at, size, source, tiny)
    out = "relaxed/few-source.json"
    at.run(out, "eval", source.name, "data=text/few.jsonl", f"sequence_length={relaxed.LENGTH}", "--out", out)
    at.together(relaxed.tasks(at, size))


def source_in(at: Commands, model: Path | None, tiny: bool) -> Path:
    """The source of (a) as an entry of OUT, so that commands can name it: a link to `model`, or SmolLM2."""
    if model is None and tiny:
        return at.run("tiny-source", "init", "text/tokenizer", "tiny-source", "num_hidden_layers=4")
    if model is None:
        from loopwise.demo.pretrained import fetch

        model = fetch()
    if not model.exists():
        raise Failed(f"--model {model}: no such file or directory")
    return at.out / at.linked(model)


def run(args: argparse.Namespace) -> list[str]:
    """Make the results and write the page. Returns the letters of those that have not finished."""
    if wrong := {*args.only} - {*SMALL}:
        raise Failed(f"--only {args.only}: {min(wrong)!r} is none of {', '.join(SMALL)}")
    if args.seeds < 1:
        raise Failed(f"--seeds {args.seeds}: at least 1")
    size = TINY if args.tiny else Size(seeds=tuple(range(args.seeds)))
    size = replace(size, share=args.share or size.share)
    whole = replace(size, seeds=(0,))
    with alone(args.out):
        one = args.what == "real" and not args.tiny
        at = Commands(args.out, workers=1 if one else 2, threads=(os.cpu_count() or 1) if one else 1)
        if args.what != "report":
            text.prepare(at.out / "text", args.text, 200_000 if args.tiny else text.MOST)
        if args.real:
            gained.take(at, args.real)
        if args.what == "small":
            small(at, size, args.only)
        source = Path("none")
        if args.what == "real":
            source = source_in(at, args.model, args.tiny)
            real(at, whole, source, args.tiny)
        return page.write(at, size, whole, _last_source(at, source), args.report, args.images)


def _last_source(at: Commands, source: Path) -> Path:
    """The source of the runs of (a) in OUT, if there are some, else `source`."""
    note = at.out / "jobs" / "relaxed.tied.json"
    return at.out / read(note)["command"][1] if note.is_file() else source


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        missing = run(args)
    except (Failed, UserError) as error:
        print(f"results: error: {error}", file=sys.stderr)
        return 2
    print(f"written to {args.report}" + (f"; not finished: {', '.join(missing)}" if missing else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
