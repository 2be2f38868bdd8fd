"""`loopwise train MODEL OUT ...`."""

from __future__ import annotations

import os
import shlex
from importlib.util import find_spec
from pathlib import Path

from loopwise.arguments import RecipeParser
from loopwise.errors import UserError, missing
from loopwise.recipe import load_recipe

from .recipe import Train


def main(argv: list[str]) -> int:
    """Train, in this process or in several that it launches."""
    operands = {"model": "model directory or hub id", "out": "directory for the trained model and its checkpoints"}
    parser = RecipeParser(
        "train",
        operands,
        Train,
        "Retrain a recurrent-depth model under a recurrence curriculum, or train a plain causal language model.",
    )
    parser.add_argument(
        "--launcher",
        choices=["ddp", "fsdp2", "zero1", "zero2", "zero3"],
        help="train in several processes: data parallel, or with what they hold split among them",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="processes on this machine (default: one a GPU)")
    parser.add_argument("--resume", action="store_true", help="go on from the last sound checkpoint in OUT, if any")
    parser.add_argument(
        "--accept-changes", action="store_true", help="with --resume: go on although settings have changed"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, sources and OUT, print the launch command and the memory a process needs, and stop",
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier run in OUT")
    args = parser.parse(argv)
    recipe = load_recipe(Train, "train", args.recipe, args.settings)
    if args.processes is not None and args.launcher is None:
        raise UserError(f"--processes {args.processes} needs --launcher")
    if args.accept_changes and not args.resume:
        raise UserError("--accept-changes belongs to --resume")
    if absent := [name for name in ("accelerate", "datasets", "peft") if find_spec(name) is None]:
        raise missing("training", ", ".join(absent), "train")
    from . import launch

    if not args.model or not args.out:
        raise UserError("MODEL and OUT may not be empty: give a model directory or hub id, and a directory to make")
    args.model = os.path.expanduser(args.model)
    out = Path(args.out).expanduser()
    if out.is_symlink():  # what stands behind it is replaced, not the link
        out = out.resolve()
    if args.dry_run:
        from .run import check

        check(args.model, out, recipe, args.resume, args.force)
        return dry_run(args.model, recipe, args.launcher, args.processes, argv)
    if launch.is_worker():
        return launch.worker(args.model, out, recipe, args.resume, args.force, args.accept_changes)
    if args.launcher:
        start = (args.model, out, recipe, args.resume, args.force, args.accept_changes)
        return launch.launch(*start, args.launcher, args.processes, argv)
    from .run import train

    train(args.model, out, recipe, args.resume, args.force, args.accept_changes)
    return 0


def dry_run(model: str, recipe: Train, launcher: str | None, processes: int | None, argv: list[str]) -> int:
    """Print what a run would start, and what each of its processes would hold."""
    from loopwise.quiet import quiet

    from . import launch, run
    from .estimate import estimate, table
    from .pretrained import load_config

    quiet()
    count = launch.count_processes(processes) if launcher else 1
    argv = [argument for argument in argv if argument != "--dry-run"]
    if launcher:
        launch.check(launcher, recipe)
        print(shlex.join(["accelerate", "launch", *launch.command(launcher, count, argv)]))
    else:
        print(shlex.join(["loopwise", "train", *argv]))
    config = load_config(model, recipe.revision)
    curriculum = run.check_model(model, config, recipe)
    depth = curriculum.deepest() if curriculum else None
    at = f", {depth.num_recurrences} recurrences" if depth else ""
    blocks = f"{recipe.batch_size} x {recipe.data.sequence_length} tokens"
    print(f"memory of each of {count} process{'es' * (count > 1)}, micro-batches of {blocks}{at}:")
    print(table(estimate(config, recipe, launcher, count, depth)))
    return 0
