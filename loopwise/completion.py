"""`loopwise completion SHELL`: a script by which bash, zsh or fish completes loopwise's command lines at TAB."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import argcomplete

from .arguments import Parser
from .candidates import answer, typed_words

SHELLS = ("bash", "zsh", "fish")


def main(argv: list[str]) -> int:
    """Print the script. Returns the exit code."""
    parser = Parser(
        prog="loopwise completion",
        description="Print the script that completes verbs, options, recipe names, keys and their values at TAB. "
        'bash and zsh, in the start-up file: eval "$(loopwise completion bash)", or zsh. '
        "fish: loopwise completion fish > ~/.config/fish/completions/loopwise.fish",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    args = parser.parse_args(argv)
    print(argcomplete.shellcode(["loopwise"], shell=args.shell))
    return 0


def complete(verbs: Mapping[str, tuple[str, str]]) -> int:
    """Answer TAB, by the shell's variables: a verb, or what the parser of the verb's module takes. Ends the process.

    verbs: verb -> (module with `main`, meaning).
    """
    words, _ = typed_words()
    if words[1:] and words[1] in verbs:
        return importlib.import_module(verbs[words[1]][0]).main([])  # parsing answers
    parser = Parser(prog="loopwise")
    parser.add_argument("-V", "--version", action="store_true", help="print the release")
    verb = parser.add_argument("verb")
    verb.completer = lambda given, prefix: {} if given else {name: about for name, (_, about) in verbs.items()}  # pyright: ignore[reportAttributeAccessIssue]
    answer(parser, 1)
    return 0
