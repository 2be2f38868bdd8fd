"""`loopwise convert SOURCE OUT [--recipe NAME|FILE] [key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..recipe import describe, load_recipe
from .recipe import ConvertRecipe


def main(argv: list[str]) -> int:
    """Parse, convert, print the plan and what was verified. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="loopwise convert",
        usage="%(prog)s SOURCE OUT [--recipe NAME|FILE] [options] [key=value ...]",
        description="Convert a pretrained decoder into a recurrent-depth model.",
        epilog="keys:\n" + describe(ConvertRecipe),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="directory of a transformers checkpoint, or a hub id")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="recipe keys, see below")
    parser.add_argument("--recipe", metavar="NAME|FILE", help="a YAML file, or the name of one in recipes/convert")
    parser.add_argument("--force", action="store_true", help="replace a non-empty OUT")
    parser.add_argument("--no-verify", action="store_true", help="skip the check against the source's layers")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    args = parser.parse_intermixed_args(argv)
    recipe = load_recipe(ConvertRecipe, "convert", args.recipe, args.settings)

    import transformers

    from .surgery import convert

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    facts = convert(
        args.source,
        args.out,
        recipe,
        force=args.force,
        check=not args.no_verify,
        dry_run=args.dry_run,
        show_progress=sys.stderr.isatty(),
    )
    print(_summary(facts))
    if args.dry_run:
        print("dry run: nothing written")
    else:
        dlogit = facts["max_dlogit"]
        verified = "not verified" if dlogit is None else f"verified, max |dlogit| {dlogit:.3g}"
        print(f"written: {args.out} ({verified})")
    return 0


def _summary(facts: dict[str, Any]) -> str:
    plan, size = facts["plan"], facts["parameters"]
    lines = [f"{part:<9}{_layers(plan['parents'][part])}" for part in ("prelude", "core", "coda")]
    lines.append(f"dropped  {plan['dropped'] or 'none'}")
    lines.append(f"injection {plan['injection']}, state {plan['state_init']}, R={plan['num_recurrences']}")
    lines.append(f"parameters {size['source']:,} -> {size['unique']:,}")
    return "\n".join(lines)


def _layers(parents: list[list[int]]) -> str:
    if not parents:
        return "none"
    return " ".join("mean(" + ",".join(map(str, group)) + ")" if len(group) > 1 else str(group[0]) for group in parents)
