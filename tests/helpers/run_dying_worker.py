"""A worker process of `loopwise convert` that writes nothing and ends itself by SIGKILL, at the moment that its job's
path names: `start`, before it is ready; `work`, `reply` (in the middle of a line) or `idle`, with unit 0. Unit 1 never
ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    job = json.loads(sys.stdin.readline())
    (Path(job["directory"]) / str(os.getpid())).touch()
    _reply('{"ready": true}\n', job["path"] == "start")
    for line in sys.stdin:
        if line.strip() != "0":
            time.sleep(600)
        reply = '{"unit": 0, "checksums": [1], "error": null}\n'
        _reply({"work": "", "reply": reply[:9]}.get(job["path"], reply), True)


def _reply(text: str, last: bool) -> None:
    print(text, end="", flush=True)
    if last:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
