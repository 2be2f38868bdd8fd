"""Files that travel from a source to the output beside weights, config and tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import UserError

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


def copy_licences(path: Path, directory: Path) -> None:
    """Copy the licence files of the source in the directory `path`. Raises UserError for a link out of it."""
    for pattern in LICENCES:
        for file in sorted(path.glob(pattern)):
            check_inside(file, path)
            if file.is_file() and file.suffix != ".py":
                shutil.copyfile(file, directory / file.name)


def check_inside(file: Path, path: Path) -> None:
    """Raise UserError where `file` of the checkpoint in the directory `path` is a link to somewhere else: it would be
    published with the output. Links into the hub's cache are how the hub keeps files."""
    from huggingface_hub.constants import HF_HUB_CACHE

    target, root = file.resolve(), path.resolve()
    homes = [root, Path(HF_HUB_CACHE).expanduser().resolve()]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent)
    if not any(target.is_relative_to(home) for home in homes):
        raise UserError(f"{file} is a link to {target}, outside of the source; put the file itself there")
