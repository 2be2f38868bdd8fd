"""Commits of hub models: a branch or tag is resolved when a run begins, and OUT keeps the commit for all its calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loopwise.foreign import COMMITS

from .pretrained import load_config
from .recipe import Train


def resolve(model: str, recipe: Train) -> Train:
    """`recipe` with commits as the revisions of the hub id `model` and of the teacher. Local directories have none.

    Raises UserError for a model that cannot be found.
    """
    teacher = _teacher(recipe)
    found = {"model": _commit(model, recipe.revision)}
    if teacher:
        found["teacher"] = _commit(teacher.teacher, teacher.revision)
    return _with(recipe, found)


def keep(model: str, recipe: Train, resolved: Train, directory: Path) -> None:
    """Write into `directory` which commit each revision of `recipe` meant."""
    asked, found = _named(model, recipe), _named(model, resolved)
    text = json.dumps({role: [*asked[role], found[role][1]] for role in asked})
    (directory / COMMITS).write_text(text, encoding="utf-8")


def kept(model: str, recipe: Train, directory: Path) -> Train:
    """`recipe` with the commits that `keep` wrote into `directory`, for models and revisions that are the same."""
    try:
        found = json.loads((directory / COMMITS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # tokens of an earlier release, or lost ones, which are made anew
        return recipe
    asked = _named(model, recipe)
    same = {role: commit for role, (*key, commit) in found.items() if role in asked and tuple(key) == asked[role]}
    return _with(recipe, same)


def _teacher(recipe: Train) -> Any:
    return recipe.objectives.distillation


def _named(model: str, recipe: Train) -> dict[str, tuple[str, str | None]]:
    """(name, revision) of each model, by its role."""
    teacher = _teacher(recipe)
    more = {"teacher": (teacher.teacher, teacher.revision)} if teacher else {}
    return {"model": (model, recipe.revision), **more}


def _commit(model: str, revision: str | None) -> str | None:
    """The commit that `revision` of the hub id `model` means now; `revision` itself for a directory."""
    load_config(model, revision)  # its errors have one line
    if Path(model).is_dir():
        return revision
    from transformers.utils.hub import cached_file, extract_commit_hash

    file = cached_file(model, "config.json", revision=revision)
    return extract_commit_hash(file, None) or revision


def _with(recipe: Train, revisions: dict[str, str | None]) -> Train:
    changes: dict[str, Any] = {"revision": revisions["model"]} if "model" in revisions else {}
    if "teacher" in revisions:
        distillation = _teacher(recipe).model_copy(update={"revision": revisions["teacher"]})
        changes["objectives"] = recipe.objectives.model_copy(update={"distillation": distillation})
    return recipe.model_copy(update=changes)
