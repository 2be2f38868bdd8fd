"""The arguments that every verb with a recipe shares."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from pydantic import BaseModel

from .errors import UserError
from .recipe import describe

SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors: one line, exit 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


class RecipeParser(Parser):
    """For `loopwise VERB OPERANDS [--recipe NAME|FILE] [options] [key=value ...]`, in any order.

    `operands` maps positional arguments to their help. The help lists the keys of `recipe`.
    """

    def __init__(self, verb: str, operands: dict[str, str], recipe: type[BaseModel], description: str):
        self.operands = list(operands)
        names = " ".join(map(str.upper, operands))
        super().__init__(
            prog=f"loopwise {verb}",
            usage=f"%(prog)s {names} [--recipe NAME|FILE] [options] [key=value ...]",
            description=description,
            epilog="".join(f"{name.upper()}: {meaning}\n" for name, meaning in operands.items())
            + "\nkeys:\n"
            + describe(recipe),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("positional", metavar="ARGUMENT", nargs="*", help=f"{names}, and key=value, all listed below")
        self.add_argument("--recipe", metavar="NAME|FILE", help=f"a YAML file, or the name of one in recipes/{verb}")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """The operands under their names, `settings` (key=value) and the options."""
        args = self.parse_intermixed_args(argv)
        args.settings = [text for text in args.positional if SETTING.match(text)]
        given = [text for text in args.positional if not SETTING.match(text)]
        if len(given) < len(self.operands):
            missing = ", ".join(name.upper() for name in self.operands[len(given) :])
            self.error(f"missing {missing}")
        if len(given) > len(self.operands):
            self.error(f"{given[len(self.operands)]!r} is not a setting: write key=value")
        for name, text in zip(self.operands, given, strict=True):
            setattr(args, name, text)
        return args
