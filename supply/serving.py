"""The packages that serving on a CPU needs: `python -m supply.serving` writes serve.txt, a part of cpu.txt.

It is what the extra `serve-cpu` needs by the metadata of installed packages, less SERVES_WITHOUT and what only those
need.
"""

from __future__ import annotations

import importlib.metadata
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .locks import LINUX, LOCKS, ROOT, SERVES_WITHOUT, read, write

HEAD = """The part of cpu.txt that `loopwise serve` needs on a CPU, for the image `serve`. As in cpu.txt, torch's
CPU build comes first, by itself. Written by `python -m supply.serving`."""


def left_out() -> set[str]:
    return {name for names in SERVES_WITHOUT.values() for name in names.split()}


def needed(without: set[str] | None = None) -> set[str]:
    """Names of all packages that loopwise[serve-cpu] needs here, less those in `without` and what only those need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    todo = [*map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["serve-cpu"]])]
    done: set[tuple[str, frozenset[str]]] = set()
    while todo:
        asked = todo.pop()
        name, extras = canonicalize_name(asked.name), frozenset(asked.extras)
        if name in (left_out() if without is None else without) or (name, extras) in done:
            continue
        done.add((name, extras))
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({**LINUX, "extra": extra}) for extra in ("", *extras)):
                todo.append(requirement)
    return {name for name, _ in done}


def main() -> None:
    names = needed()
    write(LOCKS["serve"], HEAD, [pin for pin in read(LOCKS["cpu"]) if pin.name in names and pin.applies()])


if __name__ == "__main__":
    main()
