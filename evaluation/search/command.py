"""`loopwise search MODEL data=...`: depth without training."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from ...arguments import RecipeParser
from ...directory import claimed, ended_by_sigterm
from ...errors import UserError
from ...recipe import load_recipe
from .recipe import Search


def main(argv: list[str]) -> int:
    """Search and print the result. Returns the exit code; raises UserError for bad input."""
    parser = RecipeParser(
        "search",
        {"model": "directory of a plain model, hub id, or GGUF file"},
        Search,
        "Without training: the layers of MODEL that gain when they are skipped, repeated, or run in smaller steps.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write the JSON object to FILE as the search goes on; what is in it is not measured again. loopwise plot "
        "search draws it",
    )
    parser.add_argument("--save", metavar="DIR", help="write the best program as a checkpoint that trains and serves")
    parser.add_argument("--force", action="store_true", help="start anew, and replace a DIR that Loopwise wrote")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the functions that task files name; read these first"
    )
    args = parser.parse(argv)
    recipe = load_recipe(Search, "search", args.recipe, args.settings)
    out = Path(args.out).expanduser() if args.out else None
    save_as = Path(args.save).expanduser() if args.save else None
    if args.force and not (out or save_as):
        raise UserError("--force has no effect: it belongs to --out FILE or --save DIR")
    if recipe.kind == "chains" and recipe.search_for == "each" and (save_as or recipe.check):
        name = "--save" if save_as else "check"
        raise UserError(f"search_for=each finds no chain for all, which {name} takes: search_for=all, or both")
    if args.trust_remote_code and not recipe.tasks:
        raise UserError("--trust-remote-code has no effect: it runs functions of task files, and tasks names none")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; read when tqdm is imported
    from .search import run
    from .table import table

    with ended_by_sigterm(), claimed(save_as) if save_as else nullcontext():
        result = run(args.model, recipe, out, save_as, args.force, args.trust_remote_code)
        print(json.dumps(result) if args.json else table(result), flush=True)
        if save_as:
            print(f"written: {save_as}")
    return 0
