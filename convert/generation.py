"""generation_config.json of the source, in a form that transformers saves too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..checkpoint import read_json
from ..errors import UserError, reason
from ..input_files import check_inside
from ..sampling import SETTINGS, check_setting, end_tokens, respelt

FILE = "generation_config.json"


def write_generation_config(path: Path, directory: Path) -> list[str]:
    """Write generation_config.json of the source `path` into `directory`; a line on each field that had to change.

    transformers loads files that it refuses to save, which would end a training run at its first checkpoint. Sampling
    settings without `do_sample` get it, as vLLM samples by them; settings that are refused all the same are left out.
    Raises UserError for a file that is no generation config.
    """
    file = path / FILE
    if not file.is_file():
        return []
    check_inside(file, path)
    given = read_json(file)
    try:
        fields, notes = savable(given)
    except Exception as error:  # transformers shares no base class for errors in a generation config
        raise UserError(f"{file}: {reason(error)}") from None
    text = file.read_text(encoding="utf-8") if not notes else json.dumps(fields, indent=2) + "\n"
    (directory / FILE).write_text(text, encoding="utf-8")
    return notes


def savable(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of a generation config that transformers saves, nearest to `given`; a line on each change.

    Raises ValueError for end tokens that are no ids, and where transformers refuses every part of `given`.
    """
    end_tokens(given.get("eos_token_id"))
    fields, notes = dict(given), list[str]()
    for name in SETTINGS:
        if (value := fields.get(name)) is not None:
            try:
                check_setting(name, value)
            except UserError as error:
                del fields[name]
                notes.append(f"{FILE}: {name} left out: {error}")
    spelt = respelt(fields)
    for name, value in fields.items():
        if name in SETTINGS and (name not in spelt or type(value) is not type(spelt[name]) or value != spelt[name]):
            becomes = ", ".join(f"{n}={spelt[n]!r}" for n in (name, "do_sample") if n in spelt)
            notes.append(f"{FILE}: {name}={value!r} becomes {becomes}, which means the same to transformers")
    fields = spelt
    refused = _refused(fields)
    if refused and fields.get("do_sample") is None and _refused({**fields, "do_sample": True}) != refused:
        fields["do_sample"] = True
        notes.append(f"{FILE}: do_sample=true added: its sampling settings cannot be saved without")
    for name in sorted(given):
        if (refused := _refused(fields)) is None:
            break
        without = {key: value for key, value in fields.items() if key != name}
        if _refused(without) != refused:
            fields = without
            notes.append(f"{FILE}: {name}={given[name]!r} left out: transformers refuses to save it")
    if (refused := _refused(fields)) is not None:
        raise ValueError(refused)
    return fields, notes


def _refused(fields: dict[str, Any]) -> str | None:
    """The reason why transformers would not save a generation config of these fields; None where it would."""
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_dict(dict(fields)).validate(strict=True)
    except Exception as error:
        return str(error)
    return None
