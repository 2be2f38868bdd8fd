"""Recipes: YAML files and `key=value` settings, validated by one pydantic model per command.

A setting on the command line replaces the recipe's. Dots lead into sections: `recurrence.mean=8`. Lists may be written
as `a,b`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    Strict,
    ValidationError,
    model_validator,
)

from . import aliases
from .deprecated import RECIPE_KEYS, current_name, print_warning, rename
from .errors import UserError, reason, shorten, unknown
from .unused import Unused, refuse, turned_off

RECIPES = Path(__file__).parent / "recipes"
LARGEST = 2**18  # bytes of a recipe file


class Section(BaseModel):
    """Base of every recipe section. Unknown keys are refused, and values of another type are not coerced."""

    model_config = ConfigDict(extra="forbid", validate_default=True)
    _given: frozenset[str] = PrivateAttr(default=frozenset())

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: Any) -> Any:
        """Replace old names of keys. Turn a,b,c, which YAML reads as text, and a single item into lists."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        values = rename(values, RECIPE_KEYS, fields, "recipe key")
        lists = {key: items for key in values if key in fields and (items := list_items(fields[key].annotation))}
        return {key: listed(key, x, lists[key] is not str) if key in lists else x for key, x in values.items()}

    def unused(self) -> Iterator[Unused]:
        """The keys of this section that have no effect beside its other keys."""
        yield from ()

    def refuse_unused(self, keys: Iterable[Unused]) -> None:
        """Raises UserError for the first of `keys`, which have no effect, that this recipe sets."""
        refuse(self, keys, self._given)


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


# Numbers exclude true, 1.0 for an integer, and text. Text like 1e-4 is a number, although not in YAML 1.1.
Integer = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Field(gt=0)]
Number = Annotated[float, BeforeValidator(_number), AllowInfNan(False)]


Integers = list[Integer]
Counts = list[Count]


def listed(key: str, value: object, numbers: bool) -> object:
    """`value` as a list, if it is text `a,b` or a single number. Raises ValueError for an empty item.

    Text that names an existing file is one item, as a path may hold a comma.   numbers: read 8 as an integer.
    """
    if isinstance(value, str):
        whole = "," not in value or os.path.exists(os.path.expanduser(value))  # which takes names of any length
        parts = [value] if whole else [part.strip() for part in value.split(",")]
        if not all(parts) and parts[1:]:
            raise ValueError(f"{key}={value}: nothing stands between two commas, or at an end")
        return [int(part) if numbers and re.fullmatch(r"[+-]?\d{1,18}", part) else part for part in parts]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


def list_items(annotation: Any) -> Any:
    """The item type of a field that is or may be a list or a tuple; None for other fields."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return next(filter(None, map(list_items, get_args(annotation))), None)
    return get_args(annotation)[0] if get_origin(annotation) in (list, tuple) else None


R = TypeVar("R", bound=Section)


def load_recipe(model: type[R], kind: str, recipe: str | None, settings: list[str]) -> R:
    """Read recipe `recipe` (a file, or a name under recipes/<kind>/), apply `key=value` settings, and validate.

    Raises UserError with the key, the rule and the nearest valid key.
    """
    values = settled(model, read_recipe(kind, recipe) if recipe else {}, settings)
    given = frozenset(".".join(_path(model, setting.partition("=")[0])) for setting in settings)
    checked = validate(model, values)
    for key in turned_off(checked, given):
        *section, name = key.split(".")
        holder = values
        for part in section:
            holder = holder[part]
        del holder[name]
        checked = validate(model, values)
    checked._given = given
    return checked


def settled(model: type[BaseModel], values: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """`values`, by today's names of their keys, with `key=value` settings put into them.

    Raises UserError for text that is no setting, and for a key that is given by its old and its new name.
    """
    values = _renamed(model, values)
    _check_spellings(model, settings)
    for setting in settings:
        key, eq, text = setting.partition("=")
        if not eq or not key:
            raise UserError(f"{setting!r} is not a setting: write key=value, for example {_example(model)}")
        path = _path(model, key)
        plain = _takes_text(model, path) and not text.startswith(("[", "'", '"'))
        _put(values, path, _text(model, path, text) if plain else _yaml(text, shorten(repr(setting), 80)))
    return values


def _check_spellings(model: type[BaseModel], settings: list[str]) -> None:
    """Raises UserError, before any warning, for a key that `settings` give by its old and its new name."""
    spellings: dict[tuple[str, ...], str] = {}
    for key in (setting.partition("=")[0] for setting in settings):
        path = _path(model, key, None)
        if (other := spellings.setdefault(tuple(path), key)) != key:
            raise UserError(f"{other} and {key} are two names of one recipe key: give {'.'.join(path)} alone")


def _renamed(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """`values` and the sections in them by today's names of their keys."""
    values = rename(values, RECIPE_KEYS, model.model_fields, "recipe key")
    for key, value in values.items():
        sections = sections_of(model.model_fields[key].annotation) if key in model.model_fields else []
        if sections and isinstance(value, dict):
            values[key] = _renamed(sections[0], value)
    return values


def _path(model: type[BaseModel], key: str, warn: Callable[[str], object] | None = print_warning) -> list[str]:
    """The parts of a dotted key by today's names. Parts of an unknown key stay as they are.

    warn: as for `current_name`.
    """
    path: list[str] = []
    section: type[BaseModel] | None = model
    for part in key.split("."):
        fields = section.model_fields if section else {}
        path.append(current_name(part, RECIPE_KEYS, fields, "recipe key", warn))
        sections = sections_of(fields[path[-1]].annotation) if path[-1] in fields else []
        section = sections[0] if sections else None
    return path


def _text(model: type[BaseModel], path: list[str], text: str) -> str | None:
    """The value of a key that takes only text: `text`, or None for `null` if the key is optional."""
    return None if text == "null" and _optional(model, path) else text


class Loader(aliases.Loader):
    """YAML that refuses a key that stands twice in a mapping, as one of its values would have no effect."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := next((name for name, count in names.items() if count > 1 and name != "<<"), None):
            raise yaml.constructor.ConstructorError(problem=f"the key {twice!r} stands twice")
        return super().construct_mapping(node, deep)


# Libraries change SafeLoader for the whole process: lm-format-enforcer reads dates as text. A recipe means the same.
_as_date: Any = yaml.constructor.SafeConstructor.construct_yaml_timestamp
Loader.add_constructor("tag:yaml.org,2002:timestamp", _as_date)


def _yaml(text: str, name: str) -> Any:
    """The value of the YAML `text`. Raises UserError, which begins with `name`, for text that is not YAML."""
    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise UserError(f"{name}: nested too deeply") from None
    except Exception as error:  # PyYAML passes on errors of Python's constructors, for 2020-99-99, !!int abc or 0b_
        message = str(error).strip().splitlines()[0] if isinstance(error, yaml.YAMLError) else reason(error)
        raise UserError(f"{name}: not valid YAML ({message})") from None


def validate(model: type[R], values: dict[str, Any]) -> R:
    """`values` as a `model`. Raises UserError for the first wrong key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        # Unknown keys come first: for `lora.rnk=4`, the typo matters more than the missing `lora.rank`.
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        shown = "" if first["type"] == "missing" or isinstance(first["input"], dict) else f"={first['input']!r}"
        place = list(first["loc"])
        while shown and place and isinstance(place[-1], int):
            place.pop()  # the message names an item by its value
        key = ".".join(map(str, place))
        if first["type"] == "extra_forbidden":
            raise unknown("recipe key", key, _keys(model)) from None
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{key}{shorten(shown, 200)}: {message}" if key else message) from None


def read_recipe(kind: str, recipe: str) -> dict[str, Any]:
    """The keys of the file `recipe`, or of the recipe of that name under recipes/<kind>/, not validated.

    Raises UserError for an unknown recipe, and for a file that is not a YAML mapping.
    """
    path = Path(recipe).expanduser()
    if not path.is_file():
        known = {file.stem: file for file in (RECIPES / kind).glob("*.yaml")}
        if recipe not in known and (path.suffix in (".yaml", ".yml") or not known):
            raise UserError(f"{recipe}: no such recipe file")
        if recipe not in known:
            raise unknown(f"{kind} recipe", recipe, known, few=len(known))
        path = known[recipe]
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise UserError(f"{path}: {size:,} bytes; a recipe has at most {LARGEST:,}")
        values = _yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a YAML file in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, not a {type(values).__name__}")
    return values or {}


def as_yaml(recipe: BaseModel) -> str:
    """All settings of `recipe`, defaults included, as a recipe file that gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


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
        for section in sections_of(field.annotation):
            keys += _keys(section, f"{prefix}{name}.")
    return keys


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a key of this type holds: none, or one."""
    options = getattr(annotation, "__args__", (annotation,))
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def field_of(model: type[BaseModel], path: list[str]) -> Any:
    """The type of a dotted key; None for an unknown key."""
    field = model.model_fields.get(path[0])
    if field is None or not path[1:]:
        return field and field.annotation
    return next(filter(None, (field_of(section, path[1:]) for section in sections_of(field.annotation))), None)


def _takes_text(model: type[BaseModel], path: list[str]) -> bool:
    """True if the key takes only text or lists of text, so that revision=0123 is not read as an octal number."""
    annotation = field_of(model, path)
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    bare = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in options]
    return all(kind in (str, NoneType, list[str]) or get_origin(kind) is Literal for kind in bare)


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal, which may be optional; none for another type."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((get_args(option) for option in options if get_origin(option) is Literal), ())


def _optional(model: type[BaseModel], path: list[str]) -> bool:
    return NoneType in get_args(field_of(model, path))


def _example(model: type[BaseModel]) -> str:
    name, field = next(iter(model.model_fields.items()))
    return f"{name}={field.default}"


def describe(model: type[BaseModel], prefix: str = "") -> str:
    """The keys of a recipe with their defaults and meanings, for `--help`."""
    lines = []
    for name, field in model.model_fields.items():
        sections = sections_of(field.annotation)
        if sections:
            lines += [describe(section, f"{prefix}{name}.") for section in sections]
        else:
            hidden = field.is_required() or field.default is None  # a computed default stands in the description
            choices = ", ".join(map(str, _choices(field.annotation)))
            notes = [f"one of {choices}"] if choices else []
            notes += [] if hidden else [f"default {field.default!r}"]
            note = f" ({'; '.join(notes)})" if notes else ""
            lines.append(f"  {prefix}{name}: {field.description or ''}{note}")
    return "\n".join(lines)
