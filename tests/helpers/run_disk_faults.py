"""`FOLDER JOBS`: commands of loopwise on a disk that fails, in one process with `disk_faults.c` preloaded.

JOBS is JSON, by name: {"setup": commands that run before, "command": the one that meets a fault, "again": one that runs
when the fault has gone, "resume": the same after a checkpoint, "faults": [[kind, error, for ever, place], ..]}. A
command is a list of words, with {out} and {top} for folders. `place` is a share of the calls of that kind that the
command makes without a fault. Prints a JSON line for the run of each job without a fault, and one for each fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = ("make", "write", "sync", "close", "rename")


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by its name; folders have an entry, too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "/"
        for path in sorted(folder.rglob("*"))
    }


def run(command: list[str], top: Path) -> dict[str, Any]:
    """Exit code, and lines of stderr, of a command; those of a traceback where it raises."""
    import traceback

    from loopwise.cli import main

    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
        try:
            code: Any = main([word.format(out=top / "out", top=top) for word in command])
        except BaseException:
            code = "raised"
            traceback.print_exc()
    return {"code": code, "lines": shown.getvalue().splitlines()}


def main(folder: Path, jobs: dict[str, dict[str, Any]]) -> None:
    for name, job in jobs.items():
        for found in faults(folder, job):
            print(json.dumps({"job": name, **found}), flush=True)


def faults(folder: Path, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Facts of the run of a `job` without a fault, then of one for each fault."""
    library = ctypes.CDLL(None)
    library.disk_faults_seen.restype = ctypes.c_long

    def arm(top: Path | str, kind: int = -1, which: int = 0, error: int = 0, for_ever: bool = False) -> None:
        where = str(top).encode()
        library.disk_faults_arm(where, kind, ctypes.c_long(which), error, int(for_ever))

    def fresh() -> Path:
        top = Path(tempfile.mkdtemp(dir=folder)).resolve()
        for command in job["setup"]:
            assert run(command, top)["code"] == 0
        return top

    top = fresh()
    arm(top)
    done = run(job["command"], top)
    counts = [library.disk_faults_seen(kind) for kind in range(len(KINDS))]
    arm("")
    yield {**done, "counts": dict(zip(KINDS, counts, strict=True)), "after": contents(top)}
    shutil.rmtree(top)
    for kind, error, for_ever, place in job["faults"]:
        top = fresh()
        before = contents(top)
        number = KINDS.index(kind)
        which = 1 + round(place * (counts[number] - 1))
        arm(top, number, which, error, for_ever)
        done = run(job["command"], top)
        failed = library.disk_faults_seen(-1)
        arm("")
        found = {"fault": [kind, error, for_ever, which], "failed": failed, **done, "before": before}
        found["after"] = contents(top)
        if job.get("again") and done["code"] != 0:
            begun = any(top.glob("out/checkpoint-*"))
            found["again"] = run(job["resume"] if begun else job["again"], top)
            found["finally"] = contents(top)
        yield found
        shutil.rmtree(top)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
