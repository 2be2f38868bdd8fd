"""Values of a config.json that are refused before anything is made of it: kernels of the hub, and too many layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import UserError, shorten

# Values of two fields that a config.json may have. transformers takes any other for a kernel of the hub, whose code it
# fetches and runs; and where a package lacks, it takes the hub's kernel of that name.
IMPLEMENTATIONS: dict[str, dict[str, str | None]] = {
    "attn_implementation": {
        "eager": None, "sdpa": None, "flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface",
    },
    "experts_implementation": {"eager": None, "grouped_mm": None, "batched_mm": None},
}  # fmt: skip

# Names of fields that count layers, or have an entry for each, and the most layers of a model: transformers makes all
# of them from config.json, before it looks at the weights, in some milliseconds each.
LAYERS, MOST_LAYERS = re.compile(r"(^|_)(layers?|num_blocks)(_types)?$|^(prelude|core|coda)$"), 1024


def check_values(fields: dict[str, Any], where: str) -> None:
    """Raises UserError, which begins with `where`, if the `fields` of a config.json name a kernel of the hub, or more
    layers than a model has.

    Configs inside of `fields` count, too. Names of kernels may be in an object, one for each of these.
    """
    for part in _objects(fields):
        for key, value in part.items():
            name = str(key).removeprefix("_").removesuffix("_internal")
            if name in IMPLEMENTATIONS:
                for each in value.values() if isinstance(value, dict) else [value]:
                    _check_implementation(where, name, each)
            count = len(value) if isinstance(value, list) else value
            if LAYERS.search(name) and isinstance(count, int) and count > MOST_LAYERS:
                kind = f" has {count} entries" if isinstance(value, list) else f"={count}"
                raise UserError(f"{where}: {name}{kind}; a model has at most {MOST_LAYERS} layers")


def check_layers_stored(fields: dict[str, Any], path: Path, files: list[Path]) -> None:
    """Raises UserError if the `fields` of config.json of the plain model in the directory `path` have more layers than
    its weights in `files`, if there are any.

    transformers would make the others at random, of any size, before it names them as missing.
    """
    from safetensors import safe_open

    counts = [
        count
        for part in _objects(fields)
        for name, count in part.items()
        if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") and isinstance(count, int)
    ]
    if not counts or not files:
        return
    stored = 0
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            numbers = re.findall(r"\.(\d{1,9})\.", "\n".join(tensors.keys()))
        stored = max([stored, *(int(number) + 1 for number in numbers)])
    if min(counts) > stored:
        raise UserError(f"{path}: config.json has {min(counts)} layers, and the weights have {stored}")


def _objects(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The object `fields`, and all objects inside of it."""
    inside: list[Any] = [fields]
    for part in inside:
        if isinstance(part, list):
            inside += part
        elif isinstance(part, dict):
            inside += part.values()
            yield part


def _check_implementation(where: str, name: str, value: Any) -> None:
    allowed = IMPLEMENTATIONS[name]
    if value is None:
        return
    if not isinstance(value, str) or value not in allowed:
        rule = f"choose from {', '.join(allowed)}, or remove it; kernels of the hub are code, which is not run"
        raise UserError(f"{where}: {name}={shorten(repr(value), 200)}: {rule}")
    package = allowed[value]
    if package and find_spec(package) is None:
        raise UserError(f"{where}: {name}={value!r} needs the package {package}; install it, or remove the field")
