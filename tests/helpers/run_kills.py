"""Conversions that end themselves by SIGKILL, one for each moment: `python -m tests.helpers.run_kills FOLDER ARGV...`.

Each moment is a number of written units, or a name of `MOMENTS`. Its conversion runs in a fork of one process, which
has imported everything, and writes to FOLDER/MOMENT/out.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from loopwise.cli import main
from loopwise.convert import convert_checkpoint, journal, shards

MOMENTS = ("0", "40", "values", "line", "verify")


def die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    """Let this process end at `moment`.

    values: half a tensor is in the file, and not in the journal.   line: half of a line is in the journal.   verify:
    all tensors are written.
    """
    add, write, seen = journal.Journal.add, shards.Shards.write, [0]

    def counted(self: Any, *given: Any) -> None:
        if str(seen[0]) == moment:
            die()
        seen[0] += 1
        add(self, *given)
        if moment == "line" and seen[0] == 30:
            file = self.directory / journal.JOURNAL
            file.write_bytes(file.read_bytes()[:-9])
            die()

    def half(self: Any, unit: Any) -> Any:
        done = write(self, unit)
        if moment == "values" and seen[0] == 20:
            file, start = self._places[unit[0].name]
            with open(file, "r+b") as stream:
                stream.seek(start + unit[0].bytes // 2)
                stream.write(bytes(unit[0].bytes - unit[0].bytes // 2))
            die()
        return done

    setattr(journal.Journal, "add", counted)  # noqa: B010 (for pyright)
    setattr(shards.Shards, "write", half)  # noqa: B010
    if moment == "verify":
        convert_checkpoint.verify = die


def run(folder: Path, argv: list[str]) -> None:
    """One killed conversion for every moment."""
    torch.set_num_threads(1)  # a fork has no threads of its parent's
    for moment in MOMENTS:
        (folder / moment).mkdir()
        child = os.fork()
        if not child:
            arm(moment)
            main(["convert", argv[0], str(folder / moment / "out"), *argv[1:]])
            os._exit(3)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, moment


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
