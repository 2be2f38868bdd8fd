"""`loopwise plot`: pictures of a curriculum, a training run, a measurement, a model on a text, and a running server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...arguments import Parser
from ...directory import new_file
from ...errors import UserError, reason
from ...recipe import describe, load_recipe
from .curriculum import curriculum_figure, curriculum_of_recipe
from .recipe import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = {
    "curriculum": "R by step: a recipe (name or file), with key=value",
    "run": "loss and depth of a training run: the directory OUT",
    "eval": "score or loss by recurrences and FLOPs: a FILE of loopwise eval --out",
    "depth": "recurrences by group: a FILE of loopwise eval --out, measured with endpoint or engine=lanes, and group",
    "sweep": "score or loss by mean depth: a FILE of loopwise eval exit_sweep=.. --out, or a calibration.json",
    "search": "blocks, or lengths of chains: a FILE of loopwise search --out",
    "text": "a text, each token in the colour of its depth: a MODEL, with keys below (writes .html and .png)",
    "states": "paths of the states: a MODEL, with keys below",
    "router": "the tokens that each recurrence takes: a routed MODEL, with keys below",
    "exits": "depths of generated tokens: the URL of a running server",
}
OF_MODELS = ("text", "states", "router")


def main(argv: list[str]) -> int:
    """Draw a picture into a file. Returns the exit code; raises UserError for bad input."""
    parser = Parser(
        "loopwise plot",
        description="Pictures. WHAT is one of these, and SOURCE what follows its colon:\n\n"
        + "\n".join(f"  {what:<11}{text}" for what, text in PICTURES.items()),
        epilog="keys of text, states and router:\n" + describe(Picture),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", metavar="WHAT", choices=[*PICTURES], help="the kind of picture")
    parser.add_argument("source", metavar="SOURCE", help="a recipe, a directory, a file, a model or a URL")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings, for a recipe or a model")
    parser.add_argument("--out", metavar="FILE", help="picture (default: named for WHAT and SOURCE)")
    args = parser.parse_intermixed_args(argv)
    if args.settings and args.what not in ("curriculum", *OF_MODELS):
        raise UserError(
            f"{args.settings[0]!r}: settings belong to {', '.join(('curriculum', *OF_MODELS))}; loopwise plot "
            f"{args.what} has none"
        )
    for file in draw(args):
        print(f"picture written to {file}")
    return 0


def draw(args: argparse.Namespace) -> list[Path]:
    """Draw the picture of `args.what` and write its files. Raises UserError for bad input."""
    if args.what in OF_MODELS:
        return _draw_model(args)
    if args.what == "curriculum":
        default, figure = Path("curriculum.png"), curriculum_figure(*curriculum_of_recipe(args.source, args.settings))
    elif args.what == "run":
        from .run import run_figure

        default, figure = Path(args.source) / "run.png", run_figure(Path(args.source))
    elif args.what == "exits":
        from .exits import exit_counts, exits_figure

        default, figure = Path("exits.png"), exits_figure(exit_counts(args.source), args.source)
    else:
        from .evaluation import depth_figure, eval_figure
        from .search import search_figure
        from .sweep import sweep_figure

        suffix = ".png" if args.what == "eval" else f".{args.what}.png"
        draws = {"eval": eval_figure, "depth": depth_figure, "sweep": sweep_figure, "search": search_figure}
        figure = draws[args.what](Path(args.source))
        default = Path(args.source).expanduser().with_suffix(suffix)
    file = Path(args.out or default)
    _save(figure, file)
    return [file]


def _draw_model(args: argparse.Namespace) -> list[Path]:
    from .observe import depths, states

    picture = load_recipe(Picture, "plot", None, args.settings)
    name = Path(args.source).expanduser().resolve().name
    file = Path(args.out or f"{args.what}.png")
    if args.what == "states":
        if picture.exit_rule or picture.kv_policy:
            raise UserError("exit_rule and kv_policy: loopwise plot states draws all recurrences of every token")
        from .states import states_figure

        tokens, found, trained = states(args.source, picture)
        _save(states_figure(tokens, found, picture.tokens, name, trained), file)
        return [file]
    if picture.tokens:
        raise UserError(f"tokens={picture.tokens[0]}: loopwise plot states follows tokens; {args.what} shows all")
    files = [file] if args.out or args.what == "router" else [Path("text.html"), Path("text.png")]
    if picture.file and any(f.exists() and f.samefile(Path(picture.file).expanduser()) for f in files):
        raise UserError(f"file={picture.file}: the picture would replace it; name another file with --out")
    found = depths(args.source, picture)
    if args.what == "router":
        from .router import router_figure

        if not found.routed:
            raise UserError(f"{args.source}: no routed model; loopwise plot text shows its depths")
        _save(router_figure(found, name), file)
        return [file]
    from .text import text_figure, text_page

    for file in files:
        if file.suffix == ".html":
            _save(text_page(found, name), file)
        else:
            _save(text_figure(found, name), file)
    return files


def _save(picture: Figure | str, file: Path) -> None:
    """Write a figure, or a page of HTML, whole or not at all. Raises UserError where that fails."""
    try:
        with new_file(file) as partial:
            if isinstance(picture, str):
                partial.write_text(picture, encoding="utf-8")
            else:
                picture.savefig(partial, dpi=150, format=file.suffix[1:] or "png")
    except (OSError, ValueError) as error:  # a missing folder, or a suffix that is not an image format
        raise UserError(f"--out {file}: {reason(error)}") from None
