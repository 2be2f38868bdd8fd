"""A process that holds OUT as a command does: `python -m tests.helpers.holder OUT [HOST]`. Runs until it is killed.

It has moved OUT aside, and is at work on a new one. HOST: it shows itself as process 1 of that host, as in a container.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

from loopwise import lock
from loopwise.directory import begin, beside, claimed

if __name__ == "__main__":
    out = Path(sys.argv[1])
    if sys.argv[2:]:
        socket.gethostname = lambda: sys.argv[2]
        os.getpid = lambda: 1
        lock._boot = lambda: "another-boot"  # pyright: ignore[reportPrivateUsage]
    with claimed(out):
        begin(beside(out, "partial"))
        if out.exists():
            out.rename(beside(out, "old"))
        print("held", flush=True)
        time.sleep(600)
