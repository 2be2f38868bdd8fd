"""`loopwise` commands in processes of their own: two at once, finished ones not again, killed ones resumed."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Imported once, by the process that all commands are forked from.
PRELOADED = [
    "torch", "transformers.models.llama.modeling_llama", "loopwise.cli", "loopwise.train.trainer",
    "loopwise.convert.pipeline", "loopwise.evaluation.loss",
]  # fmt: skip
FIRST_STEPS = "train_recipe.yaml"  # stands in OUT of a training run that has begun
GRACE = 60  # seconds that a command has to save when the program has ended


class Failed(Exception):
    """A command that failed, or was stopped; the message is one line."""


class Paused(Exception):
    """The time of this call is over; the message is the command that the next call begins with, or goes on with."""


class Commands:
    """Runs commands in the folder `out`, `workers` at once with `threads` threads each.

    seconds: time of this call, or None. When it is over, a training run saves a checkpoint and stops, and no other
    command starts; but a call runs one command at least, or one step of training. out/jobs/NAME.json has the command,
    its seconds (over all attempts) and their number; out/jobs/NAME.log its output.
    """

    def __init__(self, out: Path, workers: int = 2, threads: int = 1, seconds: float | None = None):
        self.out, self.workers = out.resolve(), workers
        self.end = None if seconds is None else time.monotonic() + seconds
        self.begun = False  # True after the first command of this call
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when the first process starts
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.failure: Failed | None = None
        self.making: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # several tasks may want the same
        (self.out / "jobs").mkdir(parents=True, exist_ok=True)

    def run(self, made: str, *arguments: object) -> Path:
        """Run `loopwise ARGUMENTS`, if the folder or file `made` is not finished. Returns its path.

        Raises Failed for a command that fails, and for a `made` of another command; Paused when the time is over.
        """
        with self.making[made]:
            return self._run(made, *arguments)

    def _run(self, made: str, *arguments: object) -> Path:
        if self.failure:
            raise self.failure
        argv = [str(argument) for argument in arguments]
        target, note = self.out / made, self.out / "jobs" / f"{made.replace('/', '.')}.json"
        record = read(note) if note.is_file() else {"command": argv, "seconds": 0.0, "attempts": 0}
        if record["command"] != argv:
            self._fail(f"{target} is of another command ({note}): remove both, or choose another --out")
        finished = target if target.suffix == ".json" else target / "config.json"
        if not finished.is_file():
            resume = ["--resume"] if argv[0] == "train" and (target / FIRST_STEPS).is_file() else []
            if self.begun and self._is_over():
                raise Paused(f"next is loopwise {' '.join(argv + resume)}")
            self.begun = True
            print(f"{time.strftime('%H:%M:%S')} loopwise {' '.join(argv + resume)}", flush=True)
            code = self._process([*argv, *resume], record, note)
            if not finished.is_file():
                if argv[0] == "train" and code == 0 and self._is_over():
                    raise Paused(last_line(note.with_suffix(".log")))
                self._fail(f"loopwise {' '.join(argv)}: {last_line(note.with_suffix('.log'))}")
        return target

    def linked(self, file: Path) -> str:
        """The name in OUT of a link to `file`, so that commands can name it. Raises Failed if another file has it."""
        place = self.out / file.name
        if not place.exists():
            place.symlink_to(file.resolve())
        if place.resolve() != file.resolve():
            raise Failed(f"{place} is {place.resolve()}, and not {file.resolve()}; choose another OUT")
        return file.name

    def _is_over(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end

    def _process(self, argv: list[str], record: dict[str, Any], note: Path) -> int | None:
        """The exit code of a command; `record`, in the file `note`, has the time so far at any moment."""
        record["attempts"] += 1
        before, start = record["seconds"], time.monotonic()
        end = self.end if argv[0] == "train" else None
        child = self.context.Process(target=work, args=(argv, str(self.out), str(note.with_suffix(".log")), end))
        child.start()
        while child.is_alive():
            child.join(5)
            record["seconds"] = round(before + time.monotonic() - start, 1)
            write(note, record)
        return child.exitcode

    def _fail(self, message: str) -> None:
        self.failure = self.failure or Failed(message)
        raise self.failure

    def together(self, tasks: list[Callable[[], Any]]) -> None:
        """Run `tasks`, each a row of commands, `workers` at once, in this order. Raises Failed for the first "
        "failure."""
        with ThreadPoolExecutor(self.workers) as pool:
            running = [pool.submit(task) for task in tasks]
        for one in running:
            one.result()

    def seconds(self, *prefixes: str) -> float:
        """Time of all commands whose targets begin so."""
        starts = tuple(prefix.replace("/", ".") for prefix in prefixes)
        return sum(read(note)["seconds"] for note in (self.out / "jobs").glob("*.json") if note.name.startswith(starts))

    def line(self, made: str) -> str:
        """The command that made `made`, as for a shell."""
        argv = read(self.out / "jobs" / f"{made.replace('/', '.')}.json")["command"]
        quoted = (f"'{word}'" if set(word) & set('?&*{}[]; "') else word for word in argv)
        return " ".join(["loopwise", *quoted])


def work(argv: list[str], folder: str, log: str, end: float | None = None) -> None:
    """The process of a command: its output goes to the file `log`. It stops and saves if the program ends.

    end: `time.monotonic()` at which a training run stops and saves, after its first step at the earliest.
    """
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    fcntl.flock(output, fcntl.LOCK_EX)  # a process of a killed program may still be saving
    os.dup2(output, 1)
    os.dup2(output, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if end is not None:
        threading.Thread(target=_stop_at, args=(end,), daemon=True).start()
    from loopwise.cli import main

    sys.exit(main(argv))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)


def _stop_at(end: float) -> None:
    time.sleep(max(0.0, end - time.monotonic()))
    while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # a run that trains has its own, which saves
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """The only program that works in `out`. Raises Failed beside another."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Failed(f"{out}: another run is at work in it") from None
        yield


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path, content: Any) -> None:
    """Replace `file`, whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return f"{lines[-1]} ({log})" if lines else f"no output ({log})"
