"""Several processes for one run: the side that starts them, with `accelerate launch`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from loopwise.directory import ended_by_sigterm
from loopwise.errors import UserError, missing
from loopwise.recipe import RECIPES

from .checkpoint import checkpoints
from .output import discarded_unless_begun
from .prepare import prepare
from .recipe import Train
from .settings import Run
from .watch import PREPARED


def profile(launcher: str) -> list[str]:
    """The options of `accelerate launch` for one of `ranks.LAUNCHERS`."""
    return ["--config_file", str(RECIPES / "accelerate" / f"{launcher}.yaml")]


def count_processes(processes: int | None) -> int:
    """Number of processes to start on this machine: `processes`, or one per device.

    Raises UserError for less than 1 or more than the devices here.
    """
    import torch

    devices = torch.accelerator.device_count()
    count = processes or devices
    if count < 1 or (devices and count > devices):
        most = f", at most {devices} (the devices here)" if devices else " (there is no GPU to count)"
        raise UserError(f"--processes {processes}: name at least 1{most}")
    return count


def command(launcher: str, count: int, argv: list[str]) -> list[str]:
    """The arguments of `accelerate launch` that run `loopwise train ARGV` in `count` processes on this machine."""
    options = [*profile(launcher), "--num_processes", str(count), "--main_process_port", "0"]
    return [*options, "--module", "loopwise", "train", *argv]


def remove_stale_locks(cache: Path, age: float = 300.0) -> list[Path]:
    """Delete the build locks in torch's extension cache whose folder was not touched for `age` seconds. Returns them.

    A killed build leaves its lock, and every later DeepSpeed run would wait for it forever.
    """
    removed = []
    for lock in cache.glob("**/lock"):
        touched = max((path.stat().st_mtime for path in lock.parent.iterdir()), default=0.0)
        if time.time() - touched > age:
            lock.unlink(missing_ok=True)
            removed.append(lock)
    return removed


def extensions() -> Path:
    """torch's extension cache."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else Path("~/.cache/torch_extensions").expanduser()


def check(layout: str, recipe: Train, processes: int) -> None:
    """Raises UserError if a launcher, or a `ranks.layout`, cannot run `recipe` in so many processes."""
    if recipe.data.recurrences and processes > 1 and layout in ("fsdp2", "zero3"):
        raise UserError(
            f"data.recurrences: micro-batches of ranks differ in R, and {layout} gathers the weights of every "
            "recurrence from all ranks: use ddp, zero1 or zero2"
        )
    if layout.startswith("zero") and recipe.optimiser.kind == "muon":
        raise UserError(
            f"optimiser.kind=muon needs whole matrices, which {layout} flattens and splits: use ddp or fsdp2"
        )
    if layout.startswith("zero") and find_spec("deepspeed") is None:
        raise missing(f"--launcher {layout}", "deepspeed", "train")


def launch(run: Run, launcher: str, processes: int | None, argv: list[str]) -> int:
    """Prepare the run here, then train it in `processes` copies of this command. Returns the exit code.

    Sets environment variables for the copies. Raises UserError for bad input.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    count = count_processes(processes)
    check(launcher, run.recipe, count)
    # The failed process prints its error itself; torch's launcher would print it again.
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    run = replace(run, processes=count, layout="whole" if launcher == "ddp" else launcher)
    with ended_by_sigterm():
        if not prepare(run):
            return 0
    os.environ[PREPARED] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    if not torch.accelerator.device_count():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if launcher.startswith("zero"):
        for lock in remove_stale_locks(extensions()):
            print(f"{lock}: removed, a killed build had left it", file=sys.stderr)
    started = time.time()
    args = launch_command_parser().parse_args(command(launcher, count, argv))
    try:
        with discarded_unless_begun(run.out):
            launch_command(args)
    except ChildFailedError as error:
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        # A worker saves and exits with 0 on SIGTERM. The run does so, too, if a checkpoint or the model was written.
        written = [path for path in (*checkpoints(run.out), run.out / "config.json") if path.exists()]
        saved = error.sigval == signal.SIGTERM and any(path.stat().st_mtime >= started for path in written)
        return 0 if saved else 128 + error.sigval
    return 0
