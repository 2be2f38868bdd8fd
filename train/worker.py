"""Several processes for one run: one of the processes that accelerate or torchrun started."""

from __future__ import annotations

import atexit
import os
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import NoReturn

from loopwise.directory import claimed
from loopwise.errors import UserError

from . import ranks
from .launch import PREPARED, check
from .output import discarded_unless_begun
from .prepare import prepare
from .run import work
from .settings import Run


def worker(run: Run) -> int:
    """Train as one process of a run. Returns the exit code, or ends the process.

    Under the user's own launcher (`accelerate launch -m loopwise`) the first process prepares the run. Raises UserError
    as `prepare` and `work` do.
    """
    from .progress import EndWithParent

    run = replace(run, processes=ranks.count(), layout=ranks.layout())
    first = ranks.is_first()
    try:
        if PREPARED in os.environ:
            work(run, callbacks=[EndWithParent()])
        else:
            with ExitStack() as stack:
                if _prepare_in_first(run, first, stack):
                    stack.enter_context(discarded_unless_begun(run.out) if first else nullcontext())
                    work(run)
    except UserError:
        if not first:
            time.sleep(5)  # the first process usually prints the same error, and its exit ends this process
        raise
    except KeyboardInterrupt:
        return 130  # the launcher prints the message
    return _leave()


def _prepare_in_first(run: Run, first: bool, stack: ExitStack) -> bool:
    """The result of `prepare`, which the first process calls, in every process. If it fails, the others exit.

    The first process holds OUT until `stack` ends.
    """
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.accelerator.is_available())  # joins the process group
    results: list[bool | UserError | None] = [None]
    if first:
        try:
            check(run.layout, run.recipe.optimiser)
            stack.enter_context(claimed(run.out))
            results = [prepare(run)]
        except UserError as error:
            results = [error]
    torch.distributed.broadcast_object_list(results)
    if not isinstance(results[0], UserError):
        return bool(results[0])
    if first:
        raise results[0]
    sys.exit(2)


def _leave() -> NoReturn:
    """End all processes together, without the interpreter's shutdown.

    A thread of the process group that outlives it sometimes aborts the process, after everything is written.
    """
    from accelerate import PartialState

    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
    atexit._run_exitfuncs()  # loggers and trackers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
