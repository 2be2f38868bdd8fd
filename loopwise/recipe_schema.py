"""JSON schemas of recipes, by which an editor checks and completes a recipe file.

A schema allows all that a file may hold: lists as `a,b` or as one item, numbers that YAML 1.1 reads as text (1e-4), and
old names of keys. No key is required, as the command line may bring it. Rules that join two keys are left out.
"""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel

from .deprecated import RECIPE_KEYS, old_names

Schema = dict[str, Any]
# Pydantic leaves these names where a validator stands before the bounds of a number.
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
EXPONENT = r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"


def recipe_schema(verb: str, recipe: type[BaseModel]) -> Schema:
    """The JSON schema (draft 2020-12) of a recipe file of `loopwise VERB`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_loosened(recipe.model_json_schema()),
        "title": f"recipe of loopwise {verb}",
    }


def _loosened(schema: Schema) -> Schema:
    """`schema` and all schemas in it with the other forms that recipes allow."""
    found = {BOUNDS.get(key, key): value for key, value in schema.items() if key not in ("title", "required")}
    for key in found.keys() & {"properties", "$defs"}:
        found[key] = {name: _loosened(inner) for name, inner in found[key].items()}
    for key in found.keys() & {"anyOf", "allOf", "oneOf", "prefixItems"}:
        found[key] = [_loosened(inner) for inner in found[key]]
    for key in found.keys() & {"items", "additionalProperties", "propertyNames"}:
        if isinstance(found[key], dict):
            found[key] = _loosened(found[key])
    if "properties" in found:
        found["properties"] |= _old_properties(found["properties"])
    if found.get("type") == "number":
        found |= {"type": ["number", "string"], "pattern": EXPONENT}
    return _list_or_text(found) if found.get("type") == "array" else found


def _old_properties(properties: dict[str, Schema]) -> dict[str, Schema]:
    """Schemas of the old names of `properties`."""
    found = {}
    for old, new in old_names(RECIPE_KEYS, properties).items():
        about = {"description": f"another name of {new}", "deprecated": RECIPE_KEYS[old].since is not None}
        found[old] = {**properties[new], **about}
    return found


def _list_or_text(array: Schema) -> Schema:
    """The schema of a list, of its text `a,b` and of its single number; `array` itself for a list of mappings."""
    items = cast(list[Schema], array["prefixItems"] if "prefixItems" in array else [array.get("items", {})])
    if not all("enum" in item or {*_types(item)} & {"string", "integer", "number"} for item in items):
        return array
    about = {key: array.pop(key) for key in ("description", "default") if key in array}
    single = [item for item in items if "items" in array and "enum" not in item and item.get("type") != "string"]
    return {**about, "anyOf": [array, *single, {"type": "string", "pattern": _commas(items[0])}]}


def _types(schema: Schema) -> list[str]:
    kind = schema.get("type", [])
    return [kind] if isinstance(kind, str) else kind


def _commas(item: Schema) -> str:
    """A regular expression for items that are joined by commas. Choices hold letters, digits, - and _ alone."""
    free = r"[^,]+" if item.get("type") == "string" else NUMBER
    one = "|".join(item.get("enum", [free]))
    return rf"^\s*({one})(\s*,\s*({one}))*\s*$"
