"""`loopwise train MODEL OUT ...`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from loopwise.arguments import RecipeParser
from loopwise.errors import UserError
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
    parser.add_argument("--launcher", choices=["ddp"], help="train in several processes (data parallel)")
    parser.add_argument("--processes", type=int, metavar="N", help="processes on this machine (default: one a GPU)")
    parser.add_argument("--resume", action="store_true", help="go on from the last sound checkpoint in OUT, if any")
    parser.add_argument("--force", action="store_true", help="replace an earlier run in OUT")
    args = parser.parse(argv)
    recipe = load_recipe(Train, "train", args.recipe, args.settings)
    if args.processes is not None and args.launcher is None:
        raise UserError(f"--processes {args.processes} needs --launcher ddp")
    if find_spec("accelerate") is None:
        raise UserError("training needs accelerate and datasets: pip install 'loopwise[train]'")
    from . import launch

    if not args.model or not args.out:
        raise UserError("MODEL and OUT may not be empty: give a model directory or hub id, and a directory to make")
    args.model = os.path.expanduser(args.model)
    out = Path(args.out).expanduser()
    if launch.is_worker():
        return launch.worker(args.model, out, recipe, args.resume, args.force)
    if args.launcher:
        return launch.launch(args.model, out, recipe, args.resume, args.force, args.processes, argv)
    from .run import train

    train(args.model, out, recipe, args.resume, args.force)
    return 0
