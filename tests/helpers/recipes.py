"""The recipes of all commands, and how a test loads one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loopwise.convert.recipe import ConvertRecipe
from loopwise.evaluation.calibrate import Calibrate
from loopwise.evaluation.recipe import Evaluate
from loopwise.evaluation.search.recipe import Search
from loopwise.recipe import Section, load_recipe
from loopwise.serve.generate import GenerateRecipe
from loopwise.serve.recipe import ServeRecipe
from loopwise.train.init import Init
from loopwise.train.recipe import Train

MODELS: dict[str, type[Section]] = {
    "init": Init,
    "train": Train,
    "eval": Evaluate,
    "calibrate": Calibrate,
    "search": Search,
    "convert": ConvertRecipe,
    "generate": GenerateRecipe,
    "serve": ServeRecipe,
}
# Settings that a command needs beside the one in question.
NEEDED = {
    "init": [],
    "train": ["data.train=text.txt"],
    "eval": ["data=text.txt"],
    "calibrate": ["data=text.txt"],
    "search": ["data=text.txt"],
    "convert": ["method=mor", "loops=2"],
    "generate": [],
    "serve": [],
}


def keys(model: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every key that is no section."""
    for name, field in model.model_fields.items():
        kinds = getattr(field.annotation, "__args__", (field.annotation,))
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        if not sections:
            yield prefix + name, field.annotation
        for section in sections:
            yield from keys(section, f"{prefix}{name}.")


def load(command: str, *settings: str, recipe: str | None = None) -> Any:
    """The recipe of `command` with `settings`."""
    return load_recipe(MODELS[command], command, recipe, list(settings))
