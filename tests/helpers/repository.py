"""The repository around the tests: its root, and the entries of git commands."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def git(*arguments: str) -> list[str]:
    """Entries listed by the git command of these arguments, run at the root."""
    done = subprocess.run(["git", *arguments, "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [entry for entry in done.stdout.split("\0") if entry]
