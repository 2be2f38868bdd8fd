"""Bills of materials: `python -m supply.sbom FOLDER` writes one for each lock, as CycloneDX's JSON."""

from __future__ import annotations

import sys
import tomllib
import uuid
from hashlib import sha256
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

from .locks import LOCKS, PINS, ROOT, Pin, read


def installed(name: str) -> list[Pin]:
    """The pins of a lock, and torch's CPU build, which no lock but the GPU's has."""
    pins = [pin for pin in read(LOCKS[name]) if pin.applies()]
    return pins if name == "gpu" else [*pins, next(p for p in read(PINS) if p.name == "torch" and p.applies())]


def bill(name: str) -> str:
    """The bill of materials of Loopwise with one lock, as JSON."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bom = Bom(serial_number=uuid.UUID(sha256(LOCKS[name].read_bytes()).hexdigest()[:32], version=4))
    bom.metadata.component = Component(name=project["name"], type=ComponentType.APPLICATION, bom_ref=project["name"])
    for pin in installed(name):
        address = PackageURL("pypi", name=pin.name, version=pin.version)
        hashes = [HashType(alg=HashAlgorithm.SHA_256, content=found.partition(":")[2]) for found in pin.hashes]
        bom.components.add(
            Component(name=pin.name, version=pin.version, purl=address, bom_ref=str(address), hashes=hashes)
        )
    bom.register_dependency(bom.metadata.component, bom.components)
    return make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=2)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("cpu", "gpu", "serve"):
        path = folder / f"{name}.cdx.json"
        path.write_text(bill(name) + "\n", encoding="utf-8")
        print(f"{path}: {len(installed(name))} packages")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
