"""The arguments that every verb with a recipe shares."""

from __future__ import annotations

import argparse
from typing import NoReturn

from pydantic import BaseModel

from .errors import UserError
from .recipe import describe


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors: one line, exit 2."""

    def error(self, message: str) -> NoReturn:
        message = message.replace(", key=value", "")  # argparse lists it as required, though it may be left out
        raise UserError(f"{message}; see {self.prog} --help")


def recipe_parser(verb: str, operands: dict[str, str], recipe: type[BaseModel], description: str) -> Parser:
    """A parser for `loopwise VERB OPERANDS [--recipe NAME|FILE] [options] [key=value ...]`.

    `operands` maps positional arguments to their help; parse with `parse_intermixed_args`. The help lists the keys.
    """
    parser = Parser(
        prog=f"loopwise {verb}",
        usage=f"%(prog)s {' '.join(name.upper() for name in operands)} [--recipe NAME|FILE] [options] [key=value ...]",
        description=description,
        epilog="keys:\n" + describe(recipe),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, meaning in operands.items():
        parser.add_argument(name, metavar=name.upper(), help=meaning)
    parser.add_argument("settings", metavar="key=value", nargs="*", help="recipe keys, listed below")
    parser.add_argument("--recipe", metavar="NAME|FILE", help=f"a YAML file, or the name of one in recipes/{verb}")
    return parser
