"""Writes the locks from the package index: `.venv-audit/bin/python -m supply.renew` (docs/release.md).

Versions of cpu.txt are those of constraints.txt. Versions of gpu.txt are what pip resolves for the extras on Linux
(x86-64) under Python 3.11; nothing is installed. Hashes are the index's own, of every build for a Python and a platform
that Loopwise runs on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from .locks import LOCKS, PINS, ROOT, Pin, read, write

EXTRAS = "train,serve,eval,dev,docs"
PLATFORMS = re.compile(r"any|manylinux.*(x86_64|aarch64)|macosx.*(arm64|universal2)")
SHARED = """Every package with the hashes of its builds for Python 3.11 to 3.13 on Linux and macOS. Installed with
`pip install --no-deps --require-hashes`. Written by `python -m supply.renew`."""
CPU = f"""The CPU environment: what constraints.txt pins. {SHARED}

Not verified: torch's CPU build for Linux ("+cpu"). Only PyTorch's own index has it and its hashes, which was not asked
when this file was written. `make setup` installs it first, by itself, at the version in constraints.txt."""
GPU = f"""The environment for NVIDIA GPUs: loopwise[{EXTRAS}] as pip resolves it on Linux (x86-64) under Python 3.11.
{SHARED}"""

TOOLS = f"""Tools of `make audit` and `python -m supply.renew`: pip-audit, pip-tools, CycloneDX's library. {SHARED}"""


def fits(filename: str) -> bool:
    """True for a source distribution, and a wheel for a Python and a platform that Loopwise runs on."""
    if not filename.endswith(".whl"):
        return filename.endswith((".tar.gz", ".zip"))
    try:
        tags = parse_wheel_filename(filename)[3]
    except InvalidWheelFilename:
        return False
    return any(runs(tag.interpreter, tag.abi) and PLATFORMS.fullmatch(tag.platform) for tag in tags)


def runs(interpreter: str, abi: str) -> bool:
    """True for tags of Python 3.11 to 3.13: their own, the stable interface's, and pure ones of earlier Pythons."""
    found = re.fullmatch(r"(cp|py)3(\d*)", interpreter)
    minor = int(found[2] or 0) if found else 99
    return minor <= 13 and (minor >= 11 or abi == "abi3" or (abi == "none" and interpreter.startswith("py")))


def hashes(finder: Any, name: str, version: str) -> tuple[str, ...]:
    """Hashes of all fitting files of a release, from the links of the index."""
    found = {
        f"sha256:{candidate.link.hash}"
        for candidate in finder.find_all_candidates(name)
        if str(candidate.version) == version and candidate.link.hash_name == "sha256" and fits(candidate.link.filename)
    }
    if not found:
        raise SystemExit(f"{name}=={version}: the index has no file of it with a sha256")
    return tuple(sorted(found))


def resolved(*wanted: str) -> list[str]:
    """`name==version` of all packages that `wanted` need, by pip's dry run."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report"]
        # Neither a configuration nor a folder of this machine may change what is found.
        env = {key: value for key, value in os.environ.items() if key not in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")}
        env["PIP_CONFIG_FILE"] = os.devnull
        subprocess.run([*command, str(report), *wanted], check=True, env=env)
        return listed(json.loads(report.read_text(encoding="utf-8")))


def listed(report: dict[str, Any]) -> list[str]:
    """`name==version` of all packages of a report of pip but Loopwise itself."""
    found = {canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name != "loopwise"]


def main(argv: list[str]) -> None:
    """Write cpu.txt, tools.txt and gpu.txt. A file in `argv` is a report of pip on the GPU set that was made before."""
    from piptools.repositories import PyPIRepository  # pyright: ignore[reportMissingImports]

    repository = PyPIRepository([], cache_dir=tempfile.gettempdir())
    finder: Any = repository.finder
    with repository.allow_all_wheels():

        def locked(requirements: list[str]) -> list[Pin]:
            bare = [Pin(requirement, ()) for requirement in requirements]
            return [Pin(pin.requirement, hashes(finder, pin.name, pin.version)) for pin in bare]

        cpu = locked([pin.requirement for pin in read(PINS) if not pin.version.endswith("+cpu")])
        write(LOCKS["cpu"], CPU, cpu)
        write(LOCKS["tools"], TOOLS, locked(resolved("pip-audit==2.10.1", "pip-tools==7.6.2")))
        gpu = listed(json.loads(Path(argv[0]).read_text(encoding="utf-8"))) if argv else resolved(f"{ROOT}[{EXTRAS}]")
        write(LOCKS["gpu"], GPU, locked(gpu))


if __name__ == "__main__":
    main(sys.argv[1:])
