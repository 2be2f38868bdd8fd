"""vLLM's engine processes end with the `loopwise serve` that started them."""

from __future__ import annotations

import os
import signal
import sys

SERVER = "LOOPWISE_SERVER"  # environment variable: process id of the `loopwise serve` that vLLM's processes belong to


def stop_with_server() -> None:
    """In a child of the server: leave its process group, and end when it ends. Does nothing in other processes.

    Ctrl-C in a terminal reaches a whole process group, and vLLM's workers end on it at once: open requests would fail
    instead of draining. vLLM's engine does not notice that a server was killed; its workers notice the engine's end.
    """
    if os.environ.get(SERVER) != str(os.getppid()):
        return
    import ctypes

    os.setpgid(0, 0)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
