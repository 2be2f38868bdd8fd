"""`loopwise eval MODEL data=...`: held-out loss, right answers, and the effect of the recurrences."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from ..arguments import RecipeParser
from ..directory import check_file, new_file
from ..errors import UserError
from ..recipe import load_recipe
from .recipe import Evaluate


def main(argv: list[str]) -> int:
    """Measure a model and print the result. Returns the exit code; raises UserError for bad input."""
    from .loss import evaluate
    from .report import table

    parser = RecipeParser(
        "eval",
        {"model": "model directory, hub id, or GGUF file"},
        Evaluate,
        "Held-out loss per token, and the share of right answers of conversations, at several recurrences.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--out", metavar="FILE", help="also write the JSON object to FILE; loopwise plot eval draws it")
    args = parser.parse(argv)
    recipe = load_recipe(Evaluate, "eval", args.recipe, args.settings)
    out = Path(args.out).expanduser() if args.out else None
    if out:
        check_file(out)
        _check_result(out)
    result = evaluate(args.model, recipe)
    print(json.dumps(result) if args.json else table(result), flush=True)  # before FILE, whose write may fail
    if out:
        try:
            with new_file(out) as partial:
                partial.write_text(json.dumps(result, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--out {args.out}: {error.strerror}") from None
    return 0


def _check_result(file: Path) -> None:
    """Raises UserError if `file` exists and is not a result: it may be the data, or a model's config.json."""
    if not file.is_file() or not file.stat().st_size:
        return
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict) and "results" in found:
            return
    raise UserError(f"--out {file} exists and is not a result of loopwise eval; name another file")
