"""The metadata of a model card: the YAML between two lines of dashes at the top of README.md.

The fields are the hub's (hub-docs, modelcard.md).
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from .aliases import Loader
from .carried import CARD, LICENCES
from .hub import is_hub_id, is_valid_id
from .input_files import check_inside

LONGEST = 1 << 16  # characters of a source's card that are read
FRONT = re.compile(r"\A---\r?\n(.*?)^---\r?$\n?", re.DOTALL | re.MULTILINE)
# Words of a licence's text, by its id on the hub.
KNOWN_LICENCES = {
    "apache-2.0": ("Apache License", "Version 2.0"),
    "mit": ("Permission is hereby granted, free of charge", "without restriction"),
}
TEXTS = ("", ".md", ".txt", ".html", ".pdf")  # ends of the names of licences that a card links to
CHANGED = ("modified", "modification of the", "based on the apache")  # words at the top of a licence of another kind


def metadata(
    source: str, folder: Path | None, directory: Path, tags: list[str], datasets: list[str] | None = None
) -> dict[str, Any]:
    """The metadata of the model in `directory`, which is made from `source`.

    source: a path or a hub id, maybe ID:FILE.gguf.   folder: with its card and licences, if there is one.   datasets:
    ids on the hub of the text that the model is trained on.

    A local source has no place on the hub, so base models and datasets are those of its card. The relation is the
    hub's `finetune`: weights of the same kind, changed. The hub has no word for a changed architecture. It refuses
    cards with ids that are none, so local paths and empty names of the source's card are left out.
    """
    inherited = read_metadata(folder / CARD) if folder else {}
    base = _ids(inherited.get("base_model"))
    repository = source.partition(":")[0]  # a GGUF file on the hub is ID:FILE
    if is_hub_id(repository):
        base, inherited_datasets = [repository], []
    else:
        inherited_datasets = _ids(inherited.get("datasets"))
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    found |= _licence(inherited, folder, directory, repository)
    if base:
        found["base_model"] = base[0] if len(base) == 1 else base
        found["base_model_relation"] = "finetune" if len(base) == 1 else "merge"
    if used := list(dict.fromkeys([*inherited_datasets, *(datasets or [])])):
        found["datasets"] = used
    return found


def as_front(fields: dict[str, Any]) -> str:
    """The `fields` as the beginning of a card."""
    return f"---\n{yaml.safe_dump(fields, allow_unicode=True).strip()}\n---\n"


def read_metadata(card: Path) -> dict[str, Any]:
    """The metadata of the file `card`; empty where there is none that can be read."""
    with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        with card.open(encoding="utf-8", errors="replace") as file:
            front = FRONT.match(file.read(LONGEST))
        fields = yaml.load(front[1], Loader) if front else None
        return fields if isinstance(fields, dict) else {}
    return {}


def with_metadata(text: str, fields: dict[str, Any]) -> str:
    """The card `text` with `fields` in place of its metadata."""
    return as_front(fields) + FRONT.sub("", text)


def copy_licences(path: Path, directory: Path) -> None:
    """Copy the licence files of the source `path`, and the one that its card links to, into `directory`.

    Raises UserError for a link out of `path`.
    """
    link = _linked(read_metadata(path / CARD))
    named = [path / link] if link and (path / link).is_file() and not (directory / Path(link).name).exists() else []
    for file in [*(file for pattern in LICENCES for file in sorted(path.glob(pattern))), *named]:
        check_inside(file, path)
        if file.is_file() and file.suffix != ".py":
            shutil.copyfile(file, directory / file.name)


def _linked(fields: dict[str, Any]) -> str | None:
    """The file of the source that `license_link` of its card names; None for an address, and for no text of its own."""
    link = next(iter(_texts(fields.get("license_link"))), "")
    path = Path(link)
    inside = "://" not in link and not path.is_absolute() and ".." not in path.parts
    return link if inside and path.name not in ("", CARD) and path.suffix.lower() in TEXTS else None


def _licence(inherited: dict[str, Any], folder: Path | None, directory: Path, repository: str) -> dict[str, Any]:
    """The fields on the licence: those of the source's card, else those of its licence file; none where unknown.

    A link to a file is one to the file in `directory`; without it, to that of the `repository`, if it is a hub id.
    """
    files = sorted(file for pattern in LICENCES[:2] for file in (folder.glob(pattern) if folder else []))
    if licence := _texts(inherited.get("license")):
        licence, unknown = _licence_ids(licence)
        given = {name: _texts(inherited.get(name)) for name in ("license_name", "license_link")}
        given["license_name"] = given["license_name"] or unknown[:1]
        fields = {name: _one_or_all(texts) for name, texts in {"license": licence, **given}.items() if texts}
        link = str(fields.get("license_link", ""))
        if link and "://" not in link:
            del fields["license_link"]
            if (name := Path(link).name) != CARD and (directory / name).is_file():
                fields["license_link"] = name
            elif is_hub_id(repository):
                from huggingface_hub import constants

                fields["license_link"] = f"{constants.ENDPOINT}/{repository}/blob/main/{link}"
        elif not link and "other" in licence and files:
            fields["license_link"] = files[0].name
        return fields
    for file in files:
        with suppress(OSError), file.open(encoding="utf-8", errors="replace") as stream:
            text = " ".join(stream.read(LONGEST).split())
            top = text[:300].lower()
            plain = {} if any(word in top for word in CHANGED) else KNOWN_LICENCES
            known = (name for name, words in plain.items() if all(word in text for word in words))
            return {"license": next(known, "other"), "license_link": file.name}
    return {}


def _one_or_all(texts: list[str]) -> str | list[str]:
    """The only one of `texts`, as the hub has it; of several, which it knows for licences too, all."""
    several = list(dict.fromkeys(texts))
    return several if len(several) > 1 else several[0]


def _licence_ids(texts: list[str]) -> tuple[list[str], list[str]]:
    """The hub's ids of the licences `texts`, as apache-2.0 for "Apache 2.0", and names of those that are "other"."""
    names = [re.sub(r"[^a-z0-9.+-]+", "-", text.lower()).strip("-") for text in texts]
    pairs = [*zip(texts, names, strict=True)]
    ids = [name if name == text or name in KNOWN_LICENCES else "other" for text, name in pairs]
    return ids, [name for name, id in zip(names, ids, strict=True) if name and name != id]


def _ids(value: Any) -> list[str]:
    """The ids of the hub in a field that holds one, or a list."""
    return [text for text in _texts(value) if is_valid_id(text)]


def _texts(value: Any) -> list[str]:
    """The short texts in a field that holds one, or a list."""
    texts = value if isinstance(value, list) else [value]
    return [text for text in texts if isinstance(text, str) and 0 < len(text.strip()) < 200]
