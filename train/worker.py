"""Several processes for one run: one of the processes that accelerate or torchrun started."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import NoReturn

from loopwise.directory import claimed, ended_by_sigterm
from loopwise.errors import UserError

from . import ranks
from .agree import from_first, join
from .launch import check
from .output import discarded_unless_begun
from .prepare import prepare
from .run import work
from .settings import Run
from .watch import PREPARED

TOKENISING = timedelta(days=7)  # while the first rank tokenises; the other ranks wait for it


def worker(run: Run, after: Callable[[], None]) -> int:
    """Train as one rank of a run. Returns the exit code, or ends the process.

    after: called in the first rank once the others need it no more. Under the user's own launcher (`accelerate launch
    -m loopwise`) the first rank prepares the run. Raises UserError as `prepare` and `work` do.
    """
    run = replace(run, processes=ranks.count(), layout=ranks.layout())
    first = ranks.is_first()
    try:
        join()
        with ExitStack() as stack:
            if PREPARED in os.environ:
                work(run)
            elif _prepare_in_first(run, first, stack):
                with discarded_unless_begun(run.out) if first else nullcontext():
                    work(run)
            _leave(after if first else None, stack)
    except UserError:
        if not first:
            time.sleep(5)  # the first rank usually prints the same error, and its exit ends this process
        raise
    except KeyboardInterrupt:
        return 130  # the launcher prints the message


def _prepare_in_first(run: Run, first: bool, stack: ExitStack) -> bool:
    """The result of `prepare`, which the first rank calls, in every rank. If it fails, the others exit.

    The first rank holds OUT until `stack` ends. The others wait in a group of their own, as the run's group gives up
    after the timeout of a collective, which tokenising a large text outlasts.
    """
    import torch

    waiting = torch.distributed.new_group(backend="gloo", timeout=TOKENISING)
    result: bool | UserError | None = None
    failure: BaseException | None = None
    if first:
        try:
            check(run.layout, run.recipe, run.processes)
            stack.enter_context(claimed(run.out))
            with ended_by_sigterm():
                result = prepare(run)
        except BaseException as error:  # the others would wait for it
            result, failure = UserError(str(error)), error
    result = from_first(result, waiting)
    if failure:
        raise failure
    if isinstance(result, UserError):
        sys.exit(2)
    return bool(result)


def _leave(after: Callable[[], None] | None, stack: ExitStack) -> NoReturn:
    """End all processes together, without the interpreter's shutdown; this one once `after` is done and `stack` closed.

    A thread of the process group that outlives it sometimes aborts the process, after everything is written.
    """
    from accelerate import PartialState

    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
    if after:
        after()
    stack.close()
    atexit._run_exitfuncs()  # loggers and trackers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
