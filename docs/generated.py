"""Pages of the reference that are written from the code, as a hook of MkDocs (`hooks` in mkdocs.yml).

They exist in the built site alone. A verb, a recipe key, a recipe, a request field or a metric that the code gains or
loses changes these pages with the next build. Diagrams, which the site has no script for, become lists.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from loopwise.cli import VERBS  # noqa: E402
from loopwise.deprecated import RECIPE_KEYS  # noqa: E402
from loopwise.recipe import RECIPES  # noqa: E402

if typing.TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

MERMAID = re.compile(r"```mermaid\ngraph TD\n(.*?)```", re.DOTALL)
OPERAND = re.compile(r"^([A-Z]+): (.*)$", re.MULTILINE)  # in the epilog of a parser with a recipe
ARROW = re.compile(r"^ *(\S+) --> (\S+)$", re.MULTILINE)
TYPES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any value"}
BOUNDS: dict[type, str] = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}


# ---- MkDocs ---------------------------------------------------------------------------------------------------------
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn Mermaid's graphs, which only GitHub draws, into tables: a box, and those that it imports."""
    return MERMAID.sub(lambda found: boxes(found[1]), markdown)


def boxes(graph: str) -> str:
    """A table of the arrows in the lines `a --> b` of a graph."""
    targets: dict[str, list[str]] = {}
    for box, target in ARROW.findall(graph):
        targets.setdefault(box, []).append(f"`{target}`")
    return table(["box", "imports"], [[f"`{box}`", ", ".join(found)] for box, found in targets.items()])


# ---- Markdown -------------------------------------------------------------------------------------------------------
def cell(text: str) -> str:
    """`text` as a table's cell, in which no sign is Markdown's."""
    return re.sub(r"([|*_\[\]<])", r"\\\1", " ".join(text.split()))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(title: str, about: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", about, *filter(None, parts)]) + "\n"


# ---- the command line -----------------------------------------------------------------------------------------------
def parser_of(verb: str) -> argparse.ArgumentParser:
    """The argument parser of a verb: the one whose help `loopwise VERB --help` would print."""
    found: list[argparse.ArgumentParser] = []
    keep = patch.object(argparse.ArgumentParser, "print_help", lambda parser, file=None: found.append(parser))
    with keep, suppress(SystemExit):
        importlib.import_module(VERBS[verb][0]).main(["--help"])
    return found[0]


def command_line() -> str:
    """The page of all verbs: usage, operands and options, from their parsers."""
    about = "`loopwise VERB --help` prints the same. Exit code 2 is bad input, with one line on stderr; 130 is Ctrl-C."
    verbs = [f"- [`{verb}`](#{verb}): {what}" for verb, (_, what) in VERBS.items()]
    return page("Command line", about, "\n".join(verbs), *(_verb(verb) for verb in VERBS))


def _verb(verb: str) -> str:
    parser = parser_of(verb)
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    recipe = getattr(parser, "recipe", None)
    rows = [[f"`{name}`", cell(text)] for name, text in OPERAND.findall(parser.epilog or "") if recipe]
    rows += [[f"`{_flag(action)}`", cell(action.help or "")] for action in parser._actions if _shown(action, recipe)]
    keys = f"Its keys are in [Recipe keys](keys.md#loopwise-{verb})." if recipe else ""
    heading = f"## {verb} {{ #{verb} }}"
    about = parser.description or ""
    about = f"```text\n{about}\n```" if "\n" in about else cell(about)
    more = f"```text\n{parser.epilog}\n```" if parser.epilog and not recipe else ""
    parts = [heading, about, f"```text\n{usage}\n```", keys, table(["argument", "meaning"], rows), more]
    return "\n\n".join(filter(None, parts))


def _shown(action: argparse.Action, recipe: type[BaseModel] | None) -> bool:
    return action.dest != "help" and not (recipe and action.dest == "positional")


def _flag(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings)
    value = "" if action.nargs == 0 else str(action.metavar or "|".join(map(str, action.choices or [action.dest])))
    return f"{name} {value}".strip().replace("|", "\\|")


# ---- recipes --------------------------------------------------------------------------------------------------------
def recipe_keys() -> str:
    """The page of all keys: for each verb with a recipe a table, from the recipe's pydantic classes."""
    about = (
        "Each key stands in a recipe file, or as `key=value` on the command line. "
        "[Write a recipe](../guides/recipe.md) explains both."
    )
    parts = []
    for verb in VERBS:
        if recipe := getattr(parser_of(verb), "recipe", None):
            rows = [
                [f"`{key}`", cell(_type(field)), _default(field), cell(field.description or "")]
                for key, field in keys_of(recipe)
            ]
            parts.append(f"## loopwise {verb}\n\n{table(['key', 'value', 'default', 'meaning'], rows)}")
    old = [
        [f"`{old}`", f"`{renamed.new}`", renamed.since or "a second spelling"] for old, renamed in RECIPE_KEYS.items()
    ]
    names = "## Old names\n\nThey work; a renamed one costs one warning line.\n\n"
    return page("Recipe keys", about, *parts, names + table(["old", "today", "renamed in"], old))


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted keys of a recipe, sections resolved."""
    for name, field in model.model_fields.items():
        sections = _classes(field.annotation)
        if not sections:
            yield prefix + name, field
        elif "list" in str(field.annotation):
            yield prefix + name, field
            yield from keys_of(sections[0], f"{prefix}{name}[].")
        else:
            yield from keys_of(sections[0], f"{prefix}{name}.")


def _classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _classes(part)]


def _type(field: FieldInfo) -> str:
    return " ".join([_name(field.annotation), " and ".join(_bounds(field.metadata))]).strip()


def _bounds(metadata: typing.Iterable[Any]) -> list[str]:
    return [
        f"{words} {getattr(rule, kind.__name__.lower())}"
        for rule in metadata
        for kind, words in BOUNDS.items()
        if isinstance(rule, kind)
    ]


def _name(kind: Any) -> str:
    """A type in words; of an optional one that of its value."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        rules = [rule for part in parts[1:] for rule in getattr(part, "metadata", [part])]
        return " ".join([_name(parts[0]), " and ".join(_bounds(rules))]).strip()
    if origin is typing.Literal:
        return ", ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(part) for part in parts if part is not type(None))
    if origin in (list, tuple):
        return f"list of {_name(parts[0])}"
    if origin is dict:
        return f"{{{_name(parts[0])}: {_name(parts[1])}}}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "section"
    return TYPES.get(kind, getattr(kind, "__name__", str(kind)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    empty = value is None or value == [] or value == {}
    return "" if empty else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def recipes() -> str:
    """The page of the recipes that come with Loopwise: comment and keys of every file."""
    about = "`--recipe NAME` takes one of these. A file of your own works in the same way, by its path."
    parts = []
    for folder in ("convert", "train", "serve"):
        parts.append(f"## loopwise {folder}")
        for file in sorted((RECIPES / folder).glob("*.yaml")):
            lines = file.read_text(encoding="utf-8").splitlines()
            comment = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
            keys = "\n".join(line for line in lines if not line.startswith("#"))
            parts.append(f"### {file.stem} {{ #{folder}-{file.stem.replace('.', '-')} }}\n\n{' '.join(comment)}")
            parts.append(f"```yaml\n{keys}\n```")
    return page("Recipes that come along", about, *parts)


# ---- serving --------------------------------------------------------------------------------------------------------
def request_fields() -> str:
    """The page of request fields, from serve/api, with the exit rules and the settings of diffusion."""
    from loopwise.serve.api.decoders import HISTORY
    from loopwise.serve.api.fields import ABOUT, FIELDS, OLD_FIELDS, XARGS
    from loopwise.serve.engine.diffusion_settings import FREEZES, DiffusionSettings
    from loopwise.serve.engine.exits import RULES

    about = (
        f"They stand at the top level of a request's body, or in its `{XARGS}`. All are optional. "
        "A wrong one is answered with status 400 and a message that names field, value and rule."
    )
    fields = [[f"`{name}`", *map(cell, ABOUT[name])] for name in FIELDS]
    rules = [
        [f"`{name}`", f"`{rule.threshold:g}`" if name != "fixed" else "", rule.reads] for name, rule in RULES.items()
    ]
    settings = [
        [f"`{field.name}`", f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"]
        for field in dataclasses.fields(DiffusionSettings)
        if field.name != "max_in_flight"
    ]
    parts = [
        table(["field", "value", "meaning"], fields),
        "## Exit rules",
        "[Exit rules](../concepts/exit-rules.md) explains them. To read logits costs coda and head at every depth.",
        table(["`exit_rule`", "default `exit_threshold`", "reads"], rules),
        "## Settings of diffusion",
        "[Waves and diffusion](../concepts/decoders.md#diffusion) explains them. "
        f"`freeze` is one of {', '.join(FREEZES)}.",
        table(["`diffusion.`", "default"], settings),
        "## Parameters that a wave cannot use",
        "A request for `decoder=wave` with one of these is decoded plainly, which gives the same text. "
        f"`decoder=diffusion` refuses them: {', '.join(f'`{name}`' for name in HISTORY)}.",
        "## Old names",
        table(["old", "today"], [[f"`{old}`", f"`{new}`"] for old, new in OLD_FIELDS.items()]),
    ]
    return page("Request fields", about, *parts)


def metrics() -> str:
    """The page of metrics, from the collector itself with counts of its own."""
    from loopwise.serve.vllm.metrics import DepthMetrics

    collector = object.__new__(DepthMetrics)  # without registering it
    collector.model = "model"
    collector.counts = {
        "lanes": [0, 1],
        "codas": [0, 1],
        "exits": [0, 1],
        "budget": 1,
        "decoders": {"plain": [1, 1, 1]},
    }
    rows = []
    for metric in collector.collect():
        labels = sorted({label for sample in metric.samples for label in sample.labels} - {"le"})
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        rows.append([f"`{name}`", metric.type, ", ".join(labels), cell(metric.documentation)])
    about = (
        "`/metrics` of a server has them beside vLLM's own. They are read from the engine at every scrape. "
        "A server with `engine=fixed` has vLLM's alone."
    )
    return page("Metrics", about, table(["metric", "type", "labels", "meaning"], rows))


PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": command_line,
    "reference/keys.md": recipe_keys,
    "reference/recipes.md": recipes,
    "reference/fields.md": request_fields,
    "reference/metrics.md": metrics,
}
