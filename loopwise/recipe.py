"""Recipes: YAML files and `key=value` settings, checked against one pydantic model a command.

A setting given on the command line replaces the recipe's. Dots reach into sections: `recurrence.mean=8`.
"""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError

from .errors import UserError, unknown

RECIPES = Path(__file__).parent / "recipes"


class Section(BaseModel):
    """Base of every recipe section: unknown keys are refused, values are not coerced across kinds silently."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


# What a number may be: no true, no 1.0 for an integer, no text but 1e-4, which YAML 1.1 does not take for a number.
Integer = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Field(gt=0)]
Number = Annotated[float, BeforeValidator(_number), AllowInfNan(False)]


def numbers(value: object) -> object:
    """A validator's first step: lists of numbers may be written as 1,2,3, which YAML reads as text."""
    if isinstance(value, str):
        return [int(part) if part.strip().isdigit() else part for part in value.split(",")]
    return [value] if isinstance(value, int | float) else value


Integers = Annotated[list[Integer], BeforeValidator(numbers)]
Counts = Annotated[list[Count], BeforeValidator(numbers)]

R = TypeVar("R", bound=Section)


def load_recipe(model: type[R], kind: str, recipe: str | None, settings: list[str]) -> R:
    """Read recipe `recipe` (a file, or a name under recipes/<kind>/), apply `key=value` settings, and validate.

    Raises UserError naming the key, the rule and the nearest valid key.
    """
    values = read_recipe(kind, recipe) if recipe else {}
    return validate(model, settled(model, values, settings))


def settled(model: type[BaseModel], values: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """`values` with `key=value` settings put into them. Raises UserError for what is no setting."""
    for setting in settings:
        key, eq, text = setting.partition("=")
        if not eq or not key:
            raise UserError(f"{setting!r} is not a setting: write key=value, for example {_example(model)}")
        try:
            value = text if _takes_text(model, key.split(".")) else yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{setting!r}: the value is not valid YAML ({_first_line(error)})") from None
        _put(values, key.split("."), value)
    return values


def validate(model: type[R], values: dict[str, Any]) -> R:
    """`values` as a `model`, or a UserError that names the first offending key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        # A key that is none comes first: of `lora.rnk=4`, it is no news that `lora.rank` is missing.
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise unknown("recipe key", key, _keys(model)) from None
        message = first["msg"].removeprefix("Value error, ")
        shown = "" if first["type"] == "missing" or isinstance(first["input"], dict) else f"={first['input']!r}"
        raise UserError(f"{key}{shown}: {message}" if key else message) from None


def read_recipe(kind: str, recipe: str) -> dict[str, Any]:
    """The keys of the file `recipe`, or of the recipe of that name under recipes/<kind>/, not validated yet."""
    path = Path(recipe)
    if not path.is_file():
        named = RECIPES / kind / f"{recipe}.yaml"
        if not named.is_file():
            raise unknown(f"{kind} recipe", recipe, (p.stem for p in (RECIPES / kind).glob("*.yaml")))
        path = named
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file ({_first_line(error)})") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, not a {type(values).__name__}")
    return values or {}


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    values[path[-1]] = value


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section in _sections(field.annotation):
            keys += _keys(section, f"{prefix}{name}.")
    return keys


def _sections(annotation: Any) -> list[type[BaseModel]]:
    options = getattr(annotation, "__args__", (annotation,))
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _takes_text(model: type[BaseModel], path: list[str]) -> bool:
    """Whether the key takes text alone: revision=0123 is no octal number, then, and revision=1e3 no float."""
    field = model.model_fields.get(path[0])
    if field is None:
        return False
    if path[1:]:
        return any(_takes_text(section, path[1:]) for section in _sections(field.annotation))
    options = get_args(field.annotation) if get_origin(field.annotation) is UnionType else [field.annotation]
    return all(kind in (str, NoneType) or get_origin(kind) is Literal for kind in options)


def _example(model: type[BaseModel]) -> str:
    name, field = next(iter(model.model_fields.items()))
    return f"{name}={field.default}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def describe(model: type[BaseModel], prefix: str = "") -> str:
    """The keys of a recipe with their defaults and meanings, for `--help`."""
    lines = []
    for name, field in model.model_fields.items():
        sections = _sections(field.annotation)
        if sections:
            lines += [describe(section, f"{prefix}{name}.") for section in sections]
        else:
            told = field.is_required() or field.default is None  # a default that is computed stands in the description
            default = "" if told else f" (default {field.default!r})"
            lines.append(f"  {prefix}{name}: {field.description or ''}{default}")
    return "\n".join(lines)
