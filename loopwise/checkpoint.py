"""A checkpoint directory: its config and its safetensors files, found and checked. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .config_limits import check_values
from .errors import UserError, reason, shorten
from .input_files import check_entries, check_regular, is_plain_name

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"


def config_fields(path: Path) -> dict[str, Any]:
    """The fields of config.json in the directory `path`.

    Raises UserError where there is none, or no model_type; for a recurrent-depth model of a newer format version; for a
    file that is not regular or a link out of `path`; for kernels of the hub; for too many layers; and where a PEFT
    adapter lies beside the model: transformers adds it to the weights without a word, and vLLM does not.
    """
    check_entries(path)
    if (path / ADAPTER).exists():
        raise adapter_error(str(path))
    fields = read_json(path / "config.json", f"{path} has no config.json; give the directory of a checkpoint")
    if fields.get("_class_name") == "ParcaeConfig" or fields.get("model_class_name") == "Parcae":  # no model_type
        fields.setdefault("model_type", "parcae")
    if not isinstance(fields.get("model_type"), str):
        raise UserError(f"{path / 'config.json'} has no model_type")
    check_values(fields, str(path / "config.json"))
    version = fields.get("format_version", 1)
    known = type(version) is int and version == 1  # the first, without an import; True and 1.0 equal it, too
    if fields["model_type"] == "recurrent_depth" and not known:
        from .model.configuration_fields import check_version

        try:
            check_version(version)
        except ValueError as error:
            raise UserError(f"{path / 'config.json'}: {error}") from None
    return fields


def adapter_error(model: str) -> UserError:
    """The error for a PEFT adapter beside `model`."""
    return UserError(
        f"{model} has an {ADAPTER}, a PEFT adapter: merge it into the model first (merge_and_unload), or move it "
        "elsewhere if it does not belong here"
    )


def weight_files(path: Path) -> list[Path]:
    """The weight files of the directory `path`, each whole (its header is read, its length compared).

    They are those of `weight_names`. Raises UserError as that does, and for truncated files.
    """
    files = [path / name for name in weight_names(path, files_in(path))]
    for file in files:
        _check_whole(file)
    return files


def files_in(path: Path) -> set[str]:
    """The names of the files in the directory `path`; none where there is no such directory."""
    return {file.name for file in path.iterdir() if file.is_file()} if path.is_dir() else set()


def weight_names(path: Path, stored: Collection[str]) -> list[str]:
    """The names of a checkpoint's weight files: those that transformers loads.

    path: a directory with its config.json, and the index if there is one.   stored: the names of all its files, which
    may lie elsewhere.

    `transformers_weights` in config.json names them, else they are model.safetensors, else the files of the index;
    others are left out. Raises UserError for missing files, a bad index, and pickled weights, which can run code.
    """
    named = read_json(path / "config.json").get("transformers_weights") if (path / "config.json").is_file() else None
    if named is not None:
        if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise UserError(f"{path / 'config.json'}: transformers_weights={named!r}: a safetensors file, or an index")
        if named.endswith(".json"):
            return _indexed(path, named, stored)
        return [_beside(path, named, "config.json", stored)]
    if WEIGHTS in stored:
        return [WEIGHTS]
    if INDEX in stored:
        return _indexed(path, INDEX, stored)
    if pickled := sorted(name for name in stored if "/" not in name and name.endswith((".bin", ".pt", ".pth"))):
        raise UserError(
            f"{path / pickled[0]}: pickled weights can run code and are not read; load the model in transformers and "
            "save_pretrained it as safetensors"
        )
    raise UserError(f"{path} has a config but no weights ({WEIGHTS} or {INDEX})")


def check_same_for_vllm(path: Path, files: list[Path]) -> None:
    """Raise UserError where vLLM would load other weights from the directory `path` than `files`, transformers' choice.

    vLLM loads every *.safetensors that the index names or, where there is no index, every one that lies there.
    """
    here = files_in(path)
    found = {*(_indexed(path, INDEX, here) if INDEX in here else (n for n in here if n.endswith(".safetensors")))}
    if other := sorted(found ^ {file.name for file in files})[:1]:
        raise UserError(
            f"{path}: transformers loads {files[0].name}{' and others' if files[1:] else ''}, vLLM not the same files "
            f"({other[0]}): remove what is left over of another save ({INDEX}, or that file)"
        )


def _indexed(path: Path, index: str, stored: Collection[str]) -> list[str]:
    """The files that the index of the directory `path` names. Raises UserError for a bad index, or a missing file."""
    weight_map = read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{path / index}: not a safetensors index, which has a weight_map of tensor to file name")
    return [_beside(path, name, index, stored) for name in sorted(set(weight_map.values()))]


def _beside(path: Path, name: str, where: str, stored: Collection[str]) -> str:
    """The file `name`, named in the file `where` of `path`. Raises UserError unless it is one of the `stored` ones."""
    if not is_plain_name(name):
        raise UserError(f"{path / where}: names {name!r}; weights lie in the same directory")
    if name not in stored:
        raise UserError(f"{path / name}: missing, though {where} names it")
    return name


def read_json(file: Path, absent: str = "") -> dict[str, Any]:
    """The JSON object in `file`. Raises UserError where it is none; `absent` is the message where there is no file."""
    check_regular(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(absent or f"{file}: no such file") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{file}: not valid JSON (nested too deeply)") from None
    except ValueError as error:  # of Python, too, for an integer of more than 4,300 digits
        raise UserError(f"{file}: not valid JSON ({reason(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: a JSON object is expected, not a {type(content).__name__}")
    return content


def flat(fields: dict[str, Any], above: str = "") -> dict[str, Any]:
    """The fields, those of nested objects by their names with dots."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {f"{above}{name}": value}
    return found


def first_difference(before: dict[str, Any], now: dict[str, Any], besides: str = "") -> tuple[str, str, str] | None:
    """The name of the first field, by `flat`, in which two objects differ, and its two values, shortened to words; None
    where they differ in no field, or in that of the name `besides` alone."""
    old, new = flat(before), flat(now)
    for name in dict.fromkeys([*new, *old]):
        if old.get(name) != new.get(name) and name != besides:
            was, is_now = (shorten(str(each.get(name, "left out")), 60) for each in (old, new))
            return name, was, is_now
    return None


def _check_whole(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or not a safetensors file ({error})") from None
