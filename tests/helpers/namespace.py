"""Commands in a mount namespace of their own: file systems of a given size, read-only folders."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ENTER = ["unshare", "--user", "--map-root-user", "--mount"]
LOOPWISE = f"{sys.executable} -m loopwise"


@cache
def _permitted() -> bool:
    try:
        command = [*ENTER, "sh", "-c", "mount -t tmpfs none /mnt"]
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except OSError:
        return False


def enter(script: str, **environment: str) -> list[str]:
    """The command that runs the shell `script` in a new namespace. Skips the test where mounts are not permitted.

    environment: variables that the script sets first.
    """
    if not _permitted():
        pytest.skip("mounts in a namespace of one's own are not permitted here")
    given = "".join(f"export {name}='{value}'\n" for name, value in environment.items())
    return [*ENTER, "sh", "-c", given + script]


def run(script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`script` after its end, with `cwd` as its folder."""
    place = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = enter(script, **environment)
    return subprocess.run(command, cwd=cwd, env=place, capture_output=True, text=True, timeout=300)
