"""A checkpoint directory: its config and its safetensors files, found and checked. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def config_fields(path: Path) -> dict[str, Any]:
    """The fields of config.json in the directory `path`. Raises UserError where there is none, or no model_type."""
    fields = read_json(path / "config.json", f"{path} has no config.json; give the directory of a checkpoint")
    if not isinstance(fields.get("model_type"), str):
        raise UserError(f"{path / 'config.json'} has no model_type")
    return fields


def weight_files(path: Path) -> list[Path]:
    """The weight files of the directory `path`, each whole (its header is read, its length compared).

    Raises UserError for missing or truncated files, a bad index, and pickled weights, which can run code.
    """
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{path / INDEX}: not a safetensors index, which has a weight_map of tensor to file name")
        files = [path / name for name in sorted(set(weight_map.values()))]
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"{missing[0]}: missing, though {INDEX} names it")
    elif (path / WEIGHTS).is_file():
        files = [path / WEIGHTS]
    elif pickled := sorted(p for kind in ("*.bin", "*.pt", "*.pth") for p in path.glob(kind)):
        raise UserError(
            f"{pickled[0]}: pickled weights can run code and are not read; load the model in transformers and "
            "save_pretrained it as safetensors"
        )
    else:
        raise UserError(f"{path} has a config but no weights ({WEIGHTS} or {INDEX})")
    for file in files:
        _check_whole(file)
    return files


def read_json(file: Path, absent: str = "") -> dict[str, Any]:
    """The JSON object in `file`. Raises UserError where it is none; `absent` is said where there is no file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(absent or f"{file}: no such file") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: a JSON object is expected, not a {type(content).__name__}")
    return content


def _check_whole(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or not a safetensors file ({error})") from None
