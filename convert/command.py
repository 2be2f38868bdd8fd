"""`loopwise convert SOURCE OUT [--recipe NAME|FILE] [key=value ...]`."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..arguments import RecipeParser
from ..checkpoint import read_json
from ..directory import claimed, ended_by_sigterm, free_for, place, record_of
from ..disk import room
from ..find_source import find_source
from ..push import add_options, check_target, push
from ..recipe import load_recipe
from .finished import check_done
from .inspection import describe
from .plan import PARTS
from .recipe import ConvertRecipe


def main(argv: list[str]) -> int:
    """Parse, convert, print the plan and the result of verification. Returns the exit code."""
    operands = {
        "source": "directory of a transformers checkpoint, a GGUF file, or a hub id",
        "out": "directory to write",
    }
    parser = RecipeParser(
        "convert", operands, ConvertRecipe, "Convert a pretrained decoder into a recurrent-depth model."
    )
    parser.add_argument("--force", action="store_true", help="replace an OUT that Loopwise wrote")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where a killed conversion was, if there is one; keep what is written if this one is interrupted",
    )
    parser.add_argument("--no-verify", action="store_true", help="skip the check against the source's layers")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, write nothing; a hub id's weights stay there, unless influence needs them",
    )
    parser.add_argument(
        "--seed", metavar="N", dest="added", action="append", type="seed={}".format, help="the same as seed=N"
    )
    add_options(parser)
    args = parser.parse(argv)
    recipe, out = load_recipe(ConvertRecipe, "convert", args.recipe, args.settings), Path(args.out).expanduser()
    with ended_by_sigterm(), nullcontext() if args.dry_run else claimed(out):
        target = check_target(args, args.source, out)
        if (target or args.resume) and not args.dry_run and _is_done(args, out, recipe):
            print(f"{out}: whole, and from the same source and recipe; nothing is made again")
        else:
            _report(args, _convert(args, recipe))
        if target and args.dry_run:
            print(f"would be pushed: {target}")
        elif target:
            push(target, out)
    return 0


def _is_done(args: Namespace, out: Path, recipe: ConvertRecipe) -> bool:
    """True where OUT holds what the command line `args` makes. Raises UserError where it is another output."""
    if args.force or not record_of(out):
        return False
    recipe = recipe.model_copy()
    if recipe.method:  # an import has no `init`
        source = read_json(out / "config.json").get("source_config", {}) if (out / "config.json").is_file() else {}
        widths = (source.get(name) for name in ("hidden_size", "n_embd", "d_model"))
        recipe.settle_init(next((width for width in widths if isinstance(width, int)), 0))
    asked = {"recipe": recipe.recorded()}
    check_done(out, args.source, find_source(args.source, recipe.revision)[0], asked, not args.no_verify)
    return True


def _report(args: Namespace, facts: dict[str, Any]) -> None:
    """Print the plan and the result of verification."""
    from .agreement import in_words

    print(_summary(facts))
    if args.dry_run:
        print(f"dry run: nothing written; OUT {room(facts['weight_bytes'], free_for(place(Path(args.out))))}")
    else:
        found = facts["max_dlogit_by_dtype"]
        verified = f"verified, {in_words(found)}" if found else "not verified"
        print(f"written: {args.out} ({verified})", flush=True)


def _convert(args: Namespace, recipe: ConvertRecipe) -> dict[str, Any]:
    """The facts of `convert` for the command line `args`. Imports torch."""
    from ..quiet import quiet
    from .pipeline import convert

    quiet()
    return convert(
        args.source,
        args.out,
        recipe,
        force=args.force,
        check=not args.no_verify,
        dry_run=args.dry_run,
        resume=args.resume,
        show_progress=sys.stderr.isatty(),
    )


def _summary(facts: dict[str, Any]) -> str:
    """The plan of a conversion in lines of text."""
    plan, size = facts["plan"], facts["parameters"]
    if "influence" in facts:
        from .influence import table

        print(table(facts["influence"], plan))
    lines = [f"{part:<9}{_layers(plan['parents'][part])}" for part in PARTS]
    lines.append(f"dropped  {plan['dropped'] or 'none'}")
    order = ", each layer R times in a row" if plan["sharing"] == "sequence" else ""
    damping = plan.get("recurrence_damping", 1)  # an import has none
    norm = plan.get("recurrence_norm", "none")
    order += "" if norm == "none" else f", norm {norm}"
    order += "" if damping == 1 else f", damping {damping}"
    lines.append(f"injection {plan['injection']}, state {plan['state_init']}, R={plan['num_recurrences']}{order}")
    if facts.get("router"):
        lines.append(f"router {describe(facts['router'])}")
    lines.append(f"parameters {size['source']:,} -> {size['unique']:,}")
    if facts.get("lora_error"):
        errors = ", ".join(f"{target} {error:.3g}" for target, error in facts["lora_error"].items())
        lines.append(f"relative error of the LoRA, ||W_source - W_tied - B A|| / ||W_source - W_tied||: {errors}")
    lines += [f"note: {line}" for line in facts["notes"]]
    return "\n".join(lines)


def _layers(parents: list[list[int]]) -> str:
    """The source layers of a part: `0 mean(1,4) random`."""
    if not parents:
        return "none"
    return " ".join(
        "mean(" + ",".join(map(str, group)) + ")" if len(group) > 1 else str(group[0]) if group else "random"
        for group in parents
    )
