"""A watcher of one rank, a process of its own: it kills the rank where nothing else would end it.

    python watch.py RANK LAUNCHER      process ids; a LAUNCHER of 0 is not watched

A stopped rank (SIGSTOP) keeps all others waiting in a collective until its timeout, up to 30 minutes, and a rank whose
launcher was killed goes on writing. The watcher is a process because a thread of a stopped process stops, too. It
counts its own seconds, so that a job that was suspended as a whole goes on when it is resumed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

PREPARED = "LOOPWISE_PREPARED"  # environment variable of ranks whose launcher has called `prepare`
STOPPED = 15  # seconds after which a stopped rank is killed
LATER = 5  # seconds more for a sibling, whose own watcher comes first


def watched() -> None:
    """Start a watcher of this rank and its launcher. It ends by itself when this process does.

    Only our launcher and torch's are known to stay until their ranks end; the parent of another rank may leave.
    """
    stays = PREPARED in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    command = [sys.executable, "-P", __file__, str(os.getpid()), str(os.getppid() if stays else 0)]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


def watch(rank: int, launcher: int) -> None:
    """Look at the process `rank`, this one's parent, and its siblings every second until it ends.

    launcher: the parent of `rank`, or 0. A sibling may have been stopped before it had a watcher of its own.
    """
    import psutil

    stopped: dict[int, int] = {}
    while os.getppid() == rank:
        try:
            process = psutil.Process(rank)
            if launcher and process.ppid() != launcher:
                _kill(rank, f"its launcher {launcher} is gone")
            for other in psutil.Process(launcher).children() if launcher else [process]:
                asleep = other.status() == psutil.STATUS_STOPPED
                stopped[other.pid] = stopped.get(other.pid, 0) + 1 if asleep else 0
                if stopped[other.pid] == STOPPED + (other.pid != rank) * LATER:
                    _kill(other.pid, f"it was stopped for {STOPPED} s, and the other ranks wait for it")
        except psutil.NoSuchProcess:
            pass
        time.sleep(1)


def _kill(rank: int, cause: str) -> None:
    print(f"loopwise: process {rank} is ended: {cause}; --resume goes on from its newest checkpoint", file=sys.stderr)
    os.kill(rank, signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers send it to all processes; the rank needs time to save
    watch(*map(int, sys.argv[1:]))
