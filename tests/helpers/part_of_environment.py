"""A virtual environment that holds a part of the packages of this one, by links: nothing is fetched."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

from packaging.utils import canonicalize_name


def make(folder: Path, names: set[str]) -> Path:
    """Make an environment in `folder` with the installed packages `names`. Returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin/python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site, here = folder / f"lib/{version}/site-packages", Path(sysconfig.get_path("purelib"))
    for found in importlib.metadata.distributions():
        if canonicalize_name(found.name) in names:
            files = [file for file in found.files or () if file.parts[0] not in ("..", "__pycache__")]
            for top in {file.parts[0] for file in files}:
                if (here / top).exists() and not (site / top).is_symlink():
                    own = [Path(*file.parts[1:]) for file in files if file.parts[0] == top]
                    link(here / top, site / top, own)
    return python


def link(source: Path, target: Path, files: list[Path]) -> None:
    """Link a package's folder or file. Folders that packages share, such as `google`, are linked file by file."""
    if not source.is_dir() or (source / "__init__.py").exists() or source.name.endswith((".dist-info", ".libs")):
        target.symlink_to(source)
        return
    for file in files:
        place = target / file
        if (source / file).is_file() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(source / file)
