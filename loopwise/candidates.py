"""Answers to TAB: the words that may stand where the cursor is. argcomplete is the link to the shells.

An action of a parser may have an attribute `completer`: a function of the words of its kind that are there, and of the
beginning of the next, that returns words with their meanings.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin

import argcomplete
from argcomplete.completers import FilesCompleter
from pydantic import BaseModel

from .recipe import RECIPES, field_of, list_items, sections_of

Words = dict[str, str]  # word -> its meaning
Completer = Callable[[list[str], str], Words]


def typed_words() -> tuple[list[str], str]:
    """The words before the cursor, by the shell's variables, and the beginning of the next one."""
    _, prefix, _, words, _ = argcomplete.split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))
    return words, prefix


def answer(parser: argparse.ArgumentParser, skipped: int) -> None:
    """Give the shell the words that may come next, and end the process.

    skipped: words of the line that `parser` does not read, the command's name among them.
    """

    class Finder(argcomplete.CompletionFinder):
        def collect_completions(self, active_parsers: Any, parsed_args: Any, cword_prefix: str) -> list[str]:
            found = candidates(parser, typed_words()[0][skipped:], cword_prefix)
            self._display_completions = found
            return list(found)

    Finder()(argparse.ArgumentParser(add_help=False))  # what it would find by itself is not asked for


def candidates(parser: argparse.ArgumentParser, words: list[str], prefix: str) -> Words:
    """The words that begin with `prefix` and that `parser` takes after `words`, with their meanings."""
    if "--" in words:
        return {}
    options = {name: action for action in parser._actions for name in action.option_strings}
    given, awaiting = [], None
    for word in words:
        if awaiting is not None:
            awaiting = None
        elif word in options:
            awaiting = options[word] if options[word].nargs != 0 else None
        else:
            given.append(word)
    if awaiting is None and prefix.startswith("-"):
        found = {name: action.help or "" for name, action in options.items()}
    else:
        places = [action for action in parser._actions if not action.option_strings]
        action = awaiting or (places[min(len(given), len(places) - 1)] if places else None)
        found = _values(action, given, prefix) if action else {}
    return {word: " ".join(about.split()) for word, about in found.items() if word.startswith(prefix)}


def _values(action: argparse.Action, given: list[str], prefix: str) -> Words:
    if completer := getattr(action, "completer", None):
        return completer(given, prefix)
    return dict.fromkeys(map(str, action.choices), action.help or "") if action.choices else files(prefix)


def files(prefix: str) -> Words:
    """Files and directories that begin with `prefix`."""
    return dict.fromkeys(sorted(FilesCompleter()(prefix)), "")


def recipe_names(verb: str) -> Completer:
    """For `--recipe`: names of recipes/VERB, and files."""
    names = sorted(path.stem for path in (RECIPES / verb).glob("*.yaml"))
    return lambda given, prefix: {**dict.fromkeys(names, f"recipes/{verb}"), **files(prefix)}


def operands_and_keys(recipe: type[BaseModel], operands: int, is_setting: Callable[[str], object]) -> Completer:
    """For operands and `key=value`: files while operands are missing, and keys; behind `key=`, the key's values."""

    def complete(given: list[str], prefix: str) -> Words:
        key, equals, begun = prefix.partition("=")
        if equals:
            return {f"{key}={value}": "" for value in _values_of_key(recipe, key, begun)}
        wanted = len([word for word in given if not is_setting(word)]) < operands
        keys = {} if wanted and not prefix else {f"{key}=": about for key, about in _keys(recipe)}
        return {**keys, **(files(prefix) if wanted else {})}

    return complete


def _keys(recipe: type[BaseModel], section: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys with their descriptions."""
    for name, field in recipe.model_fields.items():
        sections = sections_of(field.annotation)
        for inner in sections:
            yield from _keys(inner, f"{section}{name}.")
        if not sections:
            yield section + name, field.description or ""


def _values_of_key(recipe: type[BaseModel], key: str, begun: str) -> list[str]:
    """Values of a dotted key that begin with `begun`: its choices, also behind a comma, or files for free text."""
    kind = field_of(recipe, key.split("."))
    if choices := _choices(kind):
        first, comma, _ = begun.rpartition(",") if list_items(kind) else ("", "", "")
        return [f"{first}{comma}{choice}" for choice in choices]
    return list(files(begun)) if str in _kinds(kind) else []


def _choices(kind: Any) -> list[str]:
    """The values of Literals and booleans in a type."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if kind is bool:
        return ["true", "false"]
    return [
        choice for inner in get_args(kind) if isinstance(inner, type) or get_origin(inner) for choice in _choices(inner)
    ]


def _kinds(kind: Any) -> list[Any]:
    """A type and all types in it."""
    return [kind, *(found for inner in get_args(kind) for found in _kinds(inner))]
