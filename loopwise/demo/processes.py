"""Steps of the demo as processes. Each is a public command, printed before it runs, and leaves no process behind."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError

READY_SECONDS = 300
STEP_SECONDS = 10  # from a step's SIGINT to its SIGKILL
STOP_SECONDS = 60  # from a server's SIGTERM to its SIGKILL
PYTHON = sys.executable or "python"


class StepFailed(UserError):
    """A step failed, and has printed its error."""


def loopwise(*argv: object) -> None:
    """Run `loopwise ARGV` as a step."""
    words = [str(word) for word in argv]
    step(f"loopwise {shlex.join(words)}", [PYTHON, "-m", "loopwise", *words])


def python(*argv: object) -> None:
    """Run `python ARGV` as a step."""
    words = [str(word) for word in argv]
    step(f"python {shlex.join(words)}", [PYTHON, *words])


def step(shown: str, command: list[str]) -> None:
    """Print `shown`, run `command` to its end, print the time. Raises StepFailed for an exit code other than 0."""
    print(f"\n$ {shown}", flush=True)
    start = time.monotonic()
    with _running(command, signal.SIGINT, STEP_SECONDS) as process:
        code = process.wait()
    if code:
        raise StepFailed(f"the step above ended with exit code {code}")
    print(f"  [{time.monotonic() - start:.1f} s]", flush=True)


@contextmanager
def _running(command: list[str], ending: signal.Signals, seconds: float, **options: Any) -> Iterator[subprocess.Popen]:
    """A process in its own session, so that Ctrl-C reaches it only through this block.

    The end of the block sends the signal `ending`, and after `seconds` SIGKILL to the whole session.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(ending)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Server:
    """A `loopwise serve` of `model` in the background, with its output in `log`."""

    def __init__(self, model: Path, log: Path, *argv: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.model, self.log, self.name, self.url = model, log, model.name, f"http://127.0.0.1:{port}/v1"
        self.words = ["serve", str(model), f"port={port}", *argv]

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen]:
        """A block with the server's process, which ends with the block."""
        print(f"\n$ loopwise {shlex.join(self.words)} > {shlex.quote(str(self.log))} 2>&1 &", flush=True)
        command, self.start = [PYTHON, "-m", "loopwise", *self.words], time.monotonic()
        with (
            self.log.open("w", encoding="utf-8") as stream,
            _running(command, signal.SIGTERM, STOP_SECONDS, stdout=stream, stderr=subprocess.STDOUT) as process,
        ):
            yield process

    def wait(self, process: subprocess.Popen) -> Any:
        """An openai client, once the server answers. Raises UserError if the server ends or takes too long."""
        import openai

        client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0)
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            if process.poll() is not None:
                errors = [
                    line
                    for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()
                    if line.startswith("loopwise: error: ")
                ]
                why = errors[-1].removeprefix("loopwise: error: ") if errors else f"exit code {process.returncode}"
                raise UserError(f"the server ended: {why}; its output is in {self.log}")
            try:
                client.models.list(timeout=5)
                print(f"  [ready after {time.monotonic() - self.start:.1f} s]", flush=True)
                return client
            except openai.APIConnectionError:
                time.sleep(0.2)
        raise UserError(f"the server did not answer within {READY_SECONDS} s; its output is in {self.log}")
