"""The arguments that every verb with a recipe shares."""

from __future__ import annotations

import argparse
import json
import os
import re
from typing import Any, NoReturn

from .candidates import answer, operands_and_keys, recipe_names
from .errors import UserError
from .recipe import Section, as_yaml, describe, load_recipe
from .recipe_schema import recipe_schema

SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors: one line, exit 2. At TAB, parsing answers the shell."""

    def parse_args(self, *args: Any, **keywords: Any) -> Any:
        self._answer_tab()
        return super().parse_args(*args, **keywords)

    def parse_intermixed_args(self, *args: Any, **keywords: Any) -> Any:
        self._answer_tab()
        return super().parse_intermixed_args(*args, **keywords)

    def _answer_tab(self) -> None:
        if "_ARGCOMPLETE" in os.environ:
            answer(self, len(self.prog.split()))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


class RecipeParser(Parser):
    """For `loopwise VERB OPERANDS [--recipe NAME|FILE] [options] [key=value ...]`, in any order.

    `operands` maps positional arguments to their help. The help lists the keys of `recipe`. Settings that an option
    adds, as `seed=1` for `--seed 1`, go into `added`.
    """

    def __init__(self, verb: str, operands: dict[str, str], recipe: type[Section], description: str):
        self.verb, self.recipe = verb, recipe
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
        self._add_arguments(names)

    def _add_arguments(self, names: str) -> None:
        """Add what every such verb takes. names: the operands, for the help."""
        words: Any = self.add_argument(
            "positional", metavar="ARGUMENT", nargs="*", help=f"{names}, and key=value, all listed below"
        )
        words.completer = operands_and_keys(self.recipe, len(self.operands), SETTING.match)
        recipe: Any = self.add_argument(
            "--recipe", metavar="NAME|FILE", help=f"a YAML file, or the name of one in recipes/{self.verb}"
        )
        recipe.completer = recipe_names(self.verb)
        self.add_argument("--print-config", action="store_true", help="print all settings as a recipe file, and stop")
        self.add_argument("--print-schema", action="store_true", help="print the recipe's JSON schema, and stop")
        self.set_defaults(added=[])

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """The operands under their names, `settings` (key=value) and the options.

        Exits with code 0 after --print-config and --print-schema, which need no operands.
        """
        args = self.parse_intermixed_args(argv)
        args.settings = [text for text in args.positional if SETTING.match(text)] + args.added
        given = [text for text in args.positional if not SETTING.match(text)]
        if len(given) > len(self.operands):
            self.error(f"{given[len(self.operands)]!r} is not a setting: write key=value")
        self._print(args)
        if len(given) < len(self.operands):
            missing = ", ".join(name.upper() for name in self.operands[len(given) :])
            self.error(f"missing {missing}")
        for name, text in zip(self.operands, given, strict=True):
            setattr(args, name, text)
        return args

    def _print(self, args: argparse.Namespace) -> None:
        """Print the schema or the settings, if they are asked for, and exit with code 0."""
        if args.print_schema:
            print(json.dumps(recipe_schema(self.verb, self.recipe), indent=1))
        elif args.print_config:
            print(as_yaml(load_recipe(self.recipe, self.verb, args.recipe, args.settings)), end="")
        else:
            return
        raise SystemExit(0)
