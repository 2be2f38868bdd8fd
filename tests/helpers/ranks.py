"""A run in several processes, and what to do to one of its ranks at a given moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from bench.kills import newest

MOMENTS = ("start", "training", "checkpoint", "evaluation")
LIMIT = 60.0  # seconds for all processes to end


def start(arguments: list[str], launcher: str, processes: int = 2) -> subprocess.Popen:
    """`loopwise ARGUMENTS` in several ranks, in a session of its own; its messages go to OUT.log beside OUT."""
    more = ["--launcher", launcher, "--processes", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(f"{arguments[2]}.log", "a") as log:
        command = [sys.executable, "-m", "loopwise", *arguments, *more]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def processes_of(out: Path) -> list[psutil.Process]:
    """All living processes whose command line names `out`."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(out) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def ranks_of(launcher: subprocess.Popen, out: Path) -> list[psutil.Process]:
    """The living ranks of a run."""
    return [process for process in processes_of(out) if process.pid != launcher.pid]


def await_(launcher: subprocess.Popen, until: Callable[[], object], seconds: float = 200) -> None:
    """Until `until()` holds. Fails if the run ends before."""
    deadline = time.monotonic() + seconds
    while not until():
        assert launcher.poll() is None, f"the run ended by itself with {launcher.returncode}"
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.002)


def await_moment(launcher: subprocess.Popen, out: Path, moment: str, last: int, draw: random.Random) -> None:
    """Until the run is at one of `MOMENTS`. last: its last step, which it saves before it evaluates."""
    begun = newest(out)
    await_(launcher, lambda: len(ranks_of(launcher, out)) == 2)
    if moment == "start":
        time.sleep(draw.uniform(0, 6))
    elif moment == "training":
        await_(launcher, lambda: newest(out) > begun)
        time.sleep(draw.uniform(0, 0.3))
    elif moment == "checkpoint":
        await_(launcher, lambda: any(out.glob(".checkpoint-*.partial")))
    else:
        await_(launcher, lambda: newest(out) == last)
        time.sleep(draw.uniform(0.2, 0.5))


def strike(launcher: subprocess.Popen, out: Path, number: signal.Signals, draw: random.Random) -> float:
    """Send a signal to one rank of a run. Returns the seconds until none of the run's processes is left.

    Fails after `LIMIT`. Ends what is left then.
    """
    rank = draw.choice(ranks_of(launcher, out))
    began = time.monotonic()
    rank.send_signal(number)
    try:
        launcher.wait(LIMIT)
        while processes_of(out):
            assert time.monotonic() < began + LIMIT, f"still there: {processes_of(out)}"
            time.sleep(0.1)
        assert launcher.returncode != 0
        return time.monotonic() - began
    finally:
        for process in processes_of(out):  # nothing, unless the test fails
            process.kill()
