"""`loopwise plot`: pictures of a curriculum, of a training run, and of a measurement."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...arguments import Parser
from ...directory import new_file
from ...errors import UserError, reason
from .curriculum import curriculum_figure, curriculum_of_recipe


def main(argv: list[str]) -> int:
    """Draw a picture into a file. Returns the exit code; raises UserError for bad input."""
    parser = Parser("loopwise plot", description="Pictures of a curriculum, of a training run, or of a measurement.")
    parser.add_argument(
        "what",
        choices=["curriculum", "run", "eval", "depth"],
        help="a recipe's curriculum; a run's log; right answers (or loss) by recurrences; recurrences by group",
    )
    parser.add_argument(
        "source",
        metavar="RECIPE|OUT|FILE",
        help="a recipe (name or file); the directory of a run; a FILE of loopwise eval --out (for depth, measured with "
        "endpoint and group)",
    )
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings that replace the recipe's")
    parser.add_argument("--out", metavar="FILE", help="picture (default: curriculum.png, OUT/run.png, FILE.png)")
    args = parser.parse_intermixed_args(argv)
    file = draw(args)
    print(f"picture written to {file}")
    return 0


def draw(args: argparse.Namespace) -> Path:
    """Draw the picture of `args.what` and write its file. Raises UserError for bad input."""
    if args.what == "curriculum":
        file = Path(args.out or "curriculum.png")
        figure = curriculum_figure(*curriculum_of_recipe(args.source, args.settings))
    elif args.settings:
        raise UserError(
            f"{args.settings[0]!r}: settings belong to loopwise plot curriculum; a measurement has its own already"
        )
    elif args.what == "run":
        from .run import run_figure

        file = Path(args.out or Path(args.source) / "run.png")
        figure = run_figure(Path(args.source))
    else:
        from .evaluation import depth_figure, eval_figure

        suffix = ".depth.png" if args.what == "depth" else ".png"
        file = Path(args.out or Path(args.source).expanduser().with_suffix(suffix))
        figure = (eval_figure if args.what == "eval" else depth_figure)(Path(args.source))
    try:
        with new_file(file) as partial:
            figure.savefig(partial, dpi=150, format=file.suffix[1:] or "png")
    except (OSError, ValueError) as error:  # a missing folder, or a suffix that is not an image format
        raise UserError(f"--out {file}: {reason(error)}") from None
    return file
