"""`loopwise eval MODEL data=...` or `tasks=...`: loss, right answers or scores of tasks, by recurrences."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

from ..arguments import RecipeParser
from ..directory import check_file
from ..errors import UserError
from ..recipe import load_recipe
from .recipe import Evaluate
from .result_file import read_result, write_result


def main(argv: list[str]) -> int:
    """Measure a model and print the result. Returns the exit code; raises UserError for bad input."""
    parser = RecipeParser(
        "eval",
        {"model": "model directory, hub id, or GGUF file"},
        Evaluate,
        "At several recurrences: held-out loss per token and right answers of conversations (data), or scores of "
        "lm-eval's tasks and of your own (tasks).",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="also write the JSON object to FILE; loopwise plot eval draws it (plot sweep for exit_sweep). With tasks, "
        "FILE gets each score as soon as it is known, and a .md beside it the table; what is in FILE is not measured "
        "again",
    )
    parser.add_argument("--force", action="store_true", help="with tasks: start anew, whatever --out FILE holds")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the functions that task files name; read these first"
    )
    args = parser.parse(argv)
    recipe = load_recipe(Evaluate, "eval", args.recipe, args.settings)
    out = Path(args.out).expanduser() if args.out else None
    if args.force and not (recipe.tasks and out):
        raise UserError("--force has no effect: it starts a measurement of tasks with --out FILE anew")
    if args.trust_remote_code and not recipe.tasks:
        raise UserError("--trust-remote-code has no effect: it runs functions of task files, and tasks names none")
    if recipe.tasks:
        return _tasks(args, recipe, out)
    return _data(args.model, recipe, out, args.json)


def _tasks(args: Namespace, recipe: Evaluate, out: Path | None) -> int:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; read when tqdm is imported
    from .harness.measure import evaluate_tasks
    from .harness.record import check_out
    from .harness.table import markdown

    if out:
        check_out(out)
    result = evaluate_tasks(args.model, recipe, out, args.force, args.trust_remote_code)
    print(json.dumps(result) if args.json else markdown(result), flush=True)
    return 0


def _data(model: str, recipe: Evaluate, out: Path | None, as_json: bool) -> int:
    from .loss import evaluate
    from .report import table

    if out:
        check_file(out)
        _check_result(out)
    result = evaluate(model, recipe)
    print(json.dumps(result) if as_json else table(result), flush=True)  # before FILE, whose write may fail
    if out:
        write_result(out, result)
    return 0


def _check_result(file: Path) -> None:
    """Raises UserError if `file` exists and is not a result: it may be the data, or a model's config.json."""
    if not file.is_file() or not file.stat().st_size:
        return
    if read_result(file, ["model", "data", "results"]) is None:  # scores of tasks have no data
        raise UserError(f"--out {file} exists and is not a result of loopwise eval data=..; name another file")
