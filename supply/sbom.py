"""Bills of materials: `python -m supply.sbom FOLDER` writes one for each lock, in CycloneDX's JSON (1.6).

The same locks give the same bytes: no date, no random number.
"""

from __future__ import annotations

import json
import sys
import tomllib
import uuid
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .licenses import kinds, listed
from .locks import LOCKS, PINS, ROOT, Pin, read

SETS = ("cpu", "gpu", "serve")
NOT_SPDX = {"BSD"}  # a word of some packages' metadata, for one of several licences


def installed(name: str) -> list[Pin]:
    """The pins of a lock, and torch's CPU build, which no lock but the GPU's has."""
    pins = [pin for pin in read(LOCKS[name]) if pin.applies()]
    return pins if name == "gpu" else [*pins, next(p for p in read(PINS) if p.name == "torch" and p.applies())]


def component(pin: Pin, license: str | None) -> dict[str, Any]:
    """A package. license: an SPDX expression, or the package's own words; None: not known."""
    address = f"pkg:pypi/{pin.name}@{quote(pin.version)}"
    found: dict[str, Any] = {
        "type": "library",
        "bom-ref": address,
        "name": pin.name,
        "version": pin.version,
        "purl": address,
        "hashes": [{"alg": "SHA-256", "content": found.partition(":")[2]} for found in sorted(pin.hashes)],
    }
    if license:
        named = NOT_SPDX & set(kinds(license))
        found["licenses"] = [{"license": {"name": license}} if named else {"expression": license}]
    return found


def bill(name: str) -> dict[str, Any]:
    """The bill of materials of Loopwise with one lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    licenses, ours = listed(), project["name"]
    pins = sorted(installed(name), key=lambda pin: pin.name)
    parts = [component(pin, licenses.get(pin.name)) for pin in pins]
    contents = sha256(json.dumps(parts).encode()).hexdigest()
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.UUID(contents[:32], version=4).urn,
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": ours,
                "name": ours,
                "licenses": [{"expression": project["license"]}],
            }
        },
        "components": parts,
        "dependencies": [{"ref": ours, "dependsOn": [part["bom-ref"] for part in parts]}],
    }


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        path, made = folder / f"{name}.cdx.json", bill(name)
        path.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        print(f"{path}: {len(made['components'])} packages")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
