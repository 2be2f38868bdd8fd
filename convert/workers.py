"""Worker processes of a conversion: each opens the source by itself, and writes the units that it is told to."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import UserError
from .recipe import ConvertRecipe
from .shards import Done
from .source import Compared

MODULE = "loopwise.convert.worker"


@dataclass(frozen=True)
class Job:
    """The work of all workers. path: the source's directory.   recipe: of the conversion, as it was settled.

    directory: the unfinished output, whose weight files are laid out.   shard_bytes: their largest size.   tensors: the
    checksum of their tensors.   compared: comparisons of the source's values, which no worker repeats.
    """

    path: Path
    recipe: ConvertRecipe
    directory: Path
    shard_bytes: int
    tensors: str
    compared: Compared = field(default_factory=Compared)

    def message(self) -> dict[str, Any]:
        """The job as a worker reads it."""
        return {
            "parent": os.getpid(),
            "path": str(self.path),
            "recipe": self.recipe.model_dump(mode="json", exclude_unset=True),
            "directory": str(self.directory),
            "shard_bytes": self.shard_bytes,
            "tensors": self.tensors,
            "compared": asdict(self.compared),
        }


def work(job: Job, todo: list[int]) -> Generator[tuple[int, Done]]:
    """Each unit of `todo`, once one of `recipe.workers` processes has written it.

    The processes share the threads of this one; they end with the block, and with this process. Raises UserError as the
    writing of a unit does, OSError as it does, and ChildProcessError at once where a worker has ended, at work or idle.
    """
    waiting = iter(todo)
    with _started(job, min(job.recipe.workers, len(todo))) as workers, selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(_pipe(worker.stdout), selectors.EVENT_READ, worker)
        busy = len(workers)  # each will say that it is ready
        while busy:
            for key, _ in selector.select():
                worker: subprocess.Popen[str] = key.data
                reply = _reply(worker)
                busy -= 1
                if "unit" in reply:
                    yield reply["unit"], Done(reply["checksums"], reply["error"])
                if (unit := next(waiting, None)) is not None:
                    _send(worker, unit)
                    busy += 1


@contextmanager
def _started(job: Job, count: int) -> Generator[list[subprocess.Popen[str]]]:
    """`count` workers with `job`."""
    threads = max(1, torch.get_num_threads() // max(count, 1))
    root = str(Path(__file__).parents[2])  # that has the package; by -P no module of the current directory counts
    search = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": search}
    workers: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            worker = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                process_group=0,  # Ctrl-C reaches this process alone
            )
            workers.append(worker)
            _send(worker, job.message())
        yield workers
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.communicate()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _send(worker: subprocess.Popen[str], message: Any) -> None:
    """Send `message` in a line. A worker that has ended is found by its missing reply."""
    with suppress(BrokenPipeError):
        print(json.dumps(message), file=_pipe(worker.stdin), flush=True)


def _reply(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """The next reply of `worker`. Raises the error that it replies with, or that it has ended."""
    line = _pipe(worker.stdout).readline()
    if not line.endswith("\n"):  # the end of its output, maybe in the middle of a long reply
        code = worker.wait()
        how = f"was killed by signal {-code}, as where memory is short" if code < 0 else f"ended with exit code {code}"
        raise ChildProcessError(0, f"a worker process {how}; try fewer workers")
    reply: dict[str, Any] = json.loads(line)
    if "refused" in reply:
        raise UserError(reply["refused"])
    if "failed" in reply:
        raise OSError(*reply["failed"])
    return reply
