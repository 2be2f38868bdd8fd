"""Several processes for one run, through `accelerate launch`."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from loopwise.errors import UserError, missing
from loopwise.recipe import RECIPES

from .checkpoint import checkpoints
from .recipe import Train

LAUNCHERS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
PREPARED = "LOOPWISE_PREPARED"  # set for workers whose launcher has done `prepare`


def is_worker() -> bool:
    """Whether this process is one of several that accelerate or torchrun started."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def layout() -> str:
    """How this process's run lays out its checkpoints, from what accelerate tells its workers: `whole`, or the
    launcher that splits them."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "fsdp2"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return "whole"


def profile(launcher: str) -> list[str]:
    """The options of `accelerate launch` for one of `LAUNCHERS`."""
    return ["--config_file", str(RECIPES / "accelerate" / f"{launcher}.yaml")]


def count_processes(processes: int | None) -> int:
    """How many processes to start on this machine. Raises UserError for more than there are devices."""
    import torch

    devices = torch.accelerator.device_count()
    count = processes or devices
    if count < 1 or (devices and count > devices):
        most = f", at most {devices} (the devices here)" if devices else " (there is no GPU to count)"
        raise UserError(f"--processes {processes}: name at least 1{most}")
    return count


def command(launcher: str, count: int, argv: list[str]) -> list[str]:
    """The arguments of `accelerate launch` that train in `count` processes on this machine."""
    options = [*profile(launcher), "--num_processes", str(count), "--main_process_port", "0"]
    return [*options, "--module", "loopwise", "train", *argv]


def remove_stale_locks(cache: Path, age: float = 300.0) -> list[Path]:
    """Delete the locks of builds in torch's cache of extensions that nothing has touched for `age` seconds.

    A build that is killed leaves its lock, and every later DeepSpeed run would wait for it without end.
    """
    removed = []
    for lock in cache.glob("**/lock"):
        touched = max((path.stat().st_mtime for path in lock.parent.iterdir()), default=0.0)
        if time.time() - touched > age:
            lock.unlink(missing_ok=True)
            removed.append(lock)
    return removed


def extensions() -> Path:
    """torch's cache of extensions."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else Path("~/.cache/torch_extensions").expanduser()


def check(launcher: str, recipe: Train) -> None:
    """Raises UserError where `recipe` and `launcher`, or `layout()`, do not go together."""
    if launcher.startswith("zero") and recipe.optimiser.kind == "muon":
        raise UserError(
            f"optimiser.kind=muon needs whole matrices, which {launcher} flattens and splits: use ddp or fsdp2"
        )
    if launcher.startswith("zero") and find_spec("deepspeed") is None:
        raise missing(f"--launcher {launcher}", "deepspeed", "train")


def launch(
    model: str,
    out: Path,
    recipe: Train,
    resume: bool,
    force: bool,
    accept_changes: bool,
    launcher: str,
    processes: int | None,
    argv: list[str],
) -> int:
    """Prepare the run here, then train it in `processes` copies of this command. Returns the exit code."""
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from .output import discarded_unless_begun
    from .run import prepare

    check(launcher, recipe)
    count = count_processes(processes)
    # What failed is said by the process that failed, not by torch's launcher as well.
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    layout = "whole" if launcher == "ddp" else launcher
    if not prepare(model, out, recipe, resume, force, count, layout, accept_changes):
        return 0
    os.environ[PREPARED] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    if not torch.accelerator.device_count():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if launcher.startswith("zero"):
        for lock in remove_stale_locks(extensions()):
            print(f"{lock}: left by a build that was killed, removed", file=sys.stderr)
    started = time.time()
    args = launch_command_parser().parse_args(command(launcher, count, argv))
    try:
        with discarded_unless_begun(out):
            launch_command(args)
    except ChildFailedError as error:
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        # A worker that hears SIGTERM saves and ends with 0; so does the run, where that was done.
        saved = error.sigval == signal.SIGTERM and any(c.stat().st_mtime >= started for c in checkpoints(out))
        return 0 if saved else 128 + error.sigval
    return 0


def _prepare_as_first(
    model: str, out: Path, recipe: Train, resume: bool, force: bool, accept_changes: bool, first: bool
) -> bool:
    """What `prepare` says, to every process; only the first one prepares. Where that fails the others just end."""
    import torch
    from accelerate import PartialState

    from .run import prepare

    PartialState(cpu=not torch.accelerator.is_available())  # joins the process group
    said: list[Any] = [None]
    if first:
        try:
            check(layout(), recipe)
            said = [prepare(model, out, recipe, resume, force, int(os.environ["WORLD_SIZE"]), layout(), accept_changes)]
        except UserError as error:
            said = [error]
    torch.distributed.broadcast_object_list(said)
    if not isinstance(said[0], UserError):
        return said[0]
    if first:
        raise said[0]
    sys.exit(2)


def worker(model: str, out: Path, recipe: Train, resume: bool, force: bool, accept_changes: bool) -> int:
    """One process of a run. Under the user's own launcher (`accelerate launch -m loopwise`) the first prepares it."""
    from .output import discarded_unless_begun
    from .progress import EndWithParent
    from .run import work

    first = os.environ["RANK"] == "0"
    try:
        if PREPARED in os.environ:
            work(model, out, recipe, resume, callbacks=[EndWithParent()])
        elif _prepare_as_first(model, out, recipe, resume, force, accept_changes, first):
            with discarded_unless_begun(out) if first else nullcontext():
                work(model, out, recipe, resume)
    except UserError:
        if not first:
            time.sleep(5)  # the first process mostly says the same, and its end ends this one
        raise
    except KeyboardInterrupt:
        return 130  # the launcher says so
    return _leave()


def _leave() -> NoReturn:
    """All processes leave their group together, and end: a thread of it that is still there while the interpreter takes
    itself apart now and then aborts the process, though all is done and written."""
    from accelerate import PartialState

    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
    atexit._run_exitfuncs()  # loggers and trackers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
