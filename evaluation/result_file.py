"""Files of results: written whole or not at all, and read back by the keys that they must have."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..directory import new_file
from ..errors import UserError, shorten
from ..foreign import set_aside
from .recipe import Evaluate

KINDS = {"results", "programs"}  # keys of results: one of them is in each


def write_result(out: Path, result: dict[str, Any]) -> None:
    """Replace the file `out` by `result` as JSON. Raises UserError for a full disk.

    A file of others that has come there since the measurement began moves aside; a line on stderr has its new name.
    """
    try:
        if out.is_file() and out.stat().st_size and not KINDS & {*(read_result(out, ()) or ())}:
            print(f"{out} is not a result of Loopwise, so it is now {set_aside(out).name}", file=sys.stderr)
        with new_file(out) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None


def places(model: str, recipe: Evaluate) -> dict[str, Any]:
    """The places of a result's model and data, as a command in another directory may read the result.

    {"model_path": the absolute path of `model`, None for a hub id, "data_names": of the data to show, without folders}.
    """
    from ..train.data import sources

    path = Path(model).expanduser()
    local = {
        source: Path(source).expanduser().exists() or sources.files_of(source, recipe.split, recipe.subset) is not None
        for source in recipe.data
    }
    names = [Path(source).name if here else source for source, here in local.items()]
    return {"model_path": str(path.resolve()) if path.exists() else None, "data_names": names}


def read_result(out: Path, keys: Iterable[str]) -> dict[str, Any] | None:
    """The JSON object in `out`; None where there is none, or one that lacks some of `keys`."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(out.read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(key in found for key in keys):
            return found
    return None


def two_values(name: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The values of the setting `name` in two results, for an error."""
    return [shorten(json.dumps(one.get(name)), 60) for one in (before, now)]
