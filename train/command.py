"""`loopwise train MODEL OUT ...`."""

from __future__ import annotations

import os
import shlex
from importlib.util import find_spec
from pathlib import Path

from loopwise.arguments import RecipeParser
from loopwise.directory import claimed, ended_by_sigterm, is_whole
from loopwise.errors import UserError, missing
from loopwise.push import Target, add_options, check_target, push
from loopwise.recipe import load_recipe

from .checkpoint import RUN
from .ranks import LAUNCHERS, is_first, is_worker
from .recipe import Train
from .settings import Run
from .watch import PREPARED, watched


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
    pushes = PREPARED not in os.environ if is_worker() and is_first() else not is_worker()  # one process of a run
    target = check_target(args, args.model, out) if pushes else None
    finished = is_whole(out) and (out / RUN).is_file()
    resume = args.resume or (bool(args.push_to_hub) and finished and not args.force)  # in every rank alike
    run = Run(os.path.expanduser(args.model), out, recipe, resume, args.force, args.accept_changes)
    if resume and not args.resume:  # the user has not called OUT this run
        from .checks import check_unchanged

        check_unchanged(run)
    if args.dry_run:
        dry_run(run, args.launcher, args.processes, argv)
        if target:
            print(f"would be pushed: {target}")
        return 0
    if is_worker():
        from .worker import worker

        return worker(run, lambda: _push(target, out))
    with ended_by_sigterm(), claimed(out):
        code = _train(run, args.launcher, args.processes, argv)
        if code == 0:
            _push(target, out)
    return code


def _train(run: Run, launcher: str | None, processes: int | None, argv: list[str]) -> int:
    """Train in this process, or in those of `launcher`. Returns the exit code."""
    if launcher:
        from .launch import launch

        return launch(run, launcher, processes, argv)
    from .run import train

    train(run.model, run.out, run.recipe, run.resume, run.force, run.accept_changes)
    return 0


def _push(target: Target | None, out: Path) -> None:
    """Push `out` to the `target`, if there is one, and if the run has come to its end."""
    if target and is_whole(out):
        push(target, out)
    elif target:
        print(f"{out}: not pushed to {target.name}: the run has not come to its end; --resume goes on", flush=True)


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
    add_options(parser)
    return parser


def dry_run(run: Run, launcher: str | None, processes: int | None, argv: list[str]) -> None:
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
        launch.check(launcher, recipe, count)
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
