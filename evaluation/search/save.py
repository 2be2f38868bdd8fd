"""A program as a recurrent-depth checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...convert import ConvertRecipe, convert
from .program import Program


def save(source: str, out: Path, program: Program, revision: str | None, force: bool = False) -> dict[str, Any]:
    """Convert `source` into the checkpoint `out` that runs `program`. Returns the facts of `convert`.

    A repetition in a chain becomes the core. Raises UserError as `convert` does.
    """
    looped = program.looped()
    parts = {name: [*getattr(looped, name)] for name in ("prelude", "core", "coda")}
    keys: dict[str, Any] = {"num_recurrences": looped.recurrences, "max_recurrences": looped.recurrences}
    if looped.damping != 1.0:
        keys["recurrence_damping"] = looped.damping
    recipe = ConvertRecipe.model_validate(
        {"method": "retrofit", "layers": parts, "injection": "none", "revision": revision, **keys}
    )
    return convert(source, out, recipe, force=force)
