"""`loopwise train MODEL OUT ...`."""

from __future__ import annotations

import os
import shlex
from importlib.util import find_spec
from pathlib import Path

from loopwise.arguments import RecipeParser
from loopwise.directory import claimed
from loopwise.errors import UserError, missing
from loopwise.recipe import load_recipe

from .ranks import LAUNCHERS, is_worker
from .recipe import Train
from .settings import Run
from .watch import watched


def main(argv: list[str]) -> int:
    """Train, in this process or in several that it starts. Returns the exit code; raises UserError for bad input."""
    if is_worker():
        watched()  # before imports that take seconds
    parser = _parser()
    args = parser.parse(argv)
    recipe = load_recipe(Train, "train", args.recipe, args.settings)
    if args.processes is not None and args.launcher is None:
        raise UserError(f"--processes {args.processes} needs --launcher")
    if args.accept_changes and not args.resume:
        raise UserError("--accept-changes belongs to --resume")
    _check_packages(recipe)
    if not args.model or not args.out:
        raise UserError("MODEL and OUT may not be empty: give a model directory or hub id, and a directory to make")
    out = Path(args.out).expanduser()
    if out.is_symlink():  # its target is replaced, not the link
        out = out.resolve()
    run = Run(os.path.expanduser(args.model), out, recipe, args.resume, args.force, args.accept_changes)
    if args.dry_run:
        return dry_run(run, args.launcher, args.processes, argv)

    if is_worker():
        from .worker import worker

        return worker(run)
    with claimed(out):
        if args.launcher:
            from .launch import launch

            return launch(run, args.launcher, args.processes, argv)
        from .run import train

        train(run.model, out, recipe, args.resume, args.force, args.accept_changes)
    return 0


def _check_packages(recipe: Train) -> None:
    """Raises UserError if a package is absent that every run needs, or one with adapters. Sources name theirs."""
    needed = ["accelerate", "peft"] if recipe.adapters else ["accelerate"]
    if absent := [name for name in needed if find_spec(name) is None]:
        raise missing("training", ", ".join(absent), "train")


def _parser() -> RecipeParser:
    parser = RecipeParser(
        "train",
        {"model": "model directory or hub id", "out": "directory for the trained model and its checkpoints"},
        Train,
        "Retrain a recurrent-depth model under a recurrence curriculum, or train a plain causal language model.",
    )
    parser.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        help="train in several processes: data parallel, or with weights, gradients or optimizer state sharded",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="processes on this machine (default: one per GPU)")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest sound checkpoint in OUT, if there is one"
    )
    parser.add_argument(
        "--accept-changes", action="store_true", help="with --resume: continue although settings have changed"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, sources and OUT, print the launch command and the memory per process, and stop",
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier run in OUT")
    return parser


def dry_run(run: Run, launcher: str | None, processes: int | None, argv: list[str]) -> int:
    """Check the run, print its launch command and the memory per process. Raises UserError for bad input."""
    from loopwise.quiet import quiet

    from . import checks, fitting, launch
    from .estimate import estimate, table
    from .pretrained import load_config

    checks.check(run)
    quiet()
    count = launch.count_processes(processes) if launcher else 1
    argv = [argument for argument in argv if argument != "--dry-run"]
    recipe = run.recipe
    if launcher:
        launch.check(launcher, recipe.optimiser)
        print(shlex.join(["accelerate", "launch", *launch.command(launcher, count, argv)]))
    else:
        print(shlex.join(["loopwise", "train", *argv]))
    config = load_config(run.model, recipe.revision)
    curriculum = fitting.check_model(run.model, config, recipe)
    depth = curriculum.deepest() if curriculum else None
    at = f", {depth.num_recurrences} recurrences" if depth else ""
    blocks = f"{recipe.batch_size} x {recipe.data.sequence_length} tokens"
    print(f"memory of each of {count} process{'es' * (count > 1)}, micro-batches of {blocks}{at}:")
    print(table(estimate(config, recipe, launcher, count, depth)))
    return 0
