"""The `loopwise` command: verbs whose modules are imported only when they run."""

from __future__ import annotations

import atexit
import errno
import importlib
import os
import sys
from collections.abc import Callable

from .errors import UserError, unknown
from .streams import tolerate
from .version import __version__

# verb -> (module with `main(argv) -> int`, what it does). The order is the order of the main job.
VERBS = {
    "init": ("loopwise.train.init", "write an untrained model, to train from scratch"),
    "convert": ("loopwise.convert.command", "turn a pretrained decoder into a recurrent-depth model"),
    "train": ("loopwise.train.command", "retrain a model under a recurrence curriculum"),
    "plot": ("loopwise.evaluation.plot.command", "draw curricula, runs, measurements, texts and a running server"),
    "eval": ("loopwise.evaluation.command", "held-out loss, right answers or scores of tasks, at several recurrences"),
    "search": (
        "loopwise.evaluation.search.command",
        "layers to skip or repeat without training",
    ),
    "export": ("loopwise.convert.export", "write a model at a fixed depth as a plain checkpoint"),
    "inspect": ("loopwise.convert.inspection", "layers, parameters, KV bytes and FLOPs of a model"),
    "calibrate": ("loopwise.evaluation.calibrate", "the exit threshold that keeps the loss; thresholds of a router"),
    "generate": ("loopwise.serve.generate", "continue prompts on this machine, without a server"),
    "serve": ("loopwise.serve.server", "serve a model behind an OpenAI-compatible endpoint"),
    "completion": ("loopwise.completion", "print a script by which a shell completes these commands"),
}

COMPILING = ("train", "eval", "search", "calibrate", "generate", "serve")  # which may run torch.compile

# Errors of a file or a disk that the user can mend: no room, a disk that fails or has gone, no such place, no
# permission, a name that cannot be, too many open files.
FILES = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EBUSY,
    errno.ENOTEMPTY, errno.EMFILE, errno.ENFILE, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES,
    errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip

USAGE = "usage: loopwise VERB ... (loopwise VERB --help for more)\n\n" + "\n".join(
    f"  {verb:<11}{text}" for verb, (_, text) in VERBS.items()
)


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code; the command itself (`argv` None), once it has been a server, ends here."""
    os.environ.setdefault("USE_HUB_KERNELS", "NO")  # transformers fetches and runs code of the hub's otherwise
    if argv is not None or sys.argv[1:2] != ["serve"]:
        return guarded(_run, sys.argv[1:] if argv is None else argv)
    try:
        code = guarded(_run, sys.argv[1:])
    except SystemExit as end:  # a signal
        code = end.code if isinstance(end.code, int) else 1
    return _leave(code)


def _leave(code: int) -> int:
    """End the process with `code` as the interpreter would, but without its clean-up of modules: threads of vLLM's that
    never end keep Triton's alive, and Triton prints 27 lines about each of its types and functions that are left."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def guarded(run: Callable[[list[str]], int], argv: list[str]) -> int:
    """The result of `run(argv)`, or the exit code of its end: 2 bad input (one line on stderr), 130 interrupted."""
    tolerate()
    try:
        try:
            return run(argv)
        finally:
            sys.stdout.flush()  # here, where it is still ours to handle that a reader has left
    except UserError as error:
        print(f"loopwise: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("loopwise: interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if str(error) != "Could not determine home directory.":  # pathlib's
            raise
        why = "a path begins with ~, and no home is known: set HOME, or name a user that there is"
        print(f"loopwise: error: {why}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        _forget_stdout()
        return 141
    except OSError as error:
        if error.errno not in FILES:
            raise
        print(f"loopwise: error: {error.filename or 'what was to be printed'}: {error.strerror}", file=sys.stderr)
        if not error.filename:  # the file behind stdout is full
            _forget_stdout()
        return 2


def _forget_stdout() -> None:
    """Let what is still to be written to it vanish: the interpreter would try once more at its end, and fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str]) -> int:
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        return importlib.import_module("loopwise.completion").complete(VERBS)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"loopwise {__version__}")
        return 0
    if argv[0] not in VERBS:
        raise unknown("verb", argv[0], VERBS)
    if argv[0] != "serve":
        # OpenMP's threads spin while they wait; beside any other work on the machine that cost a factor of 10 to 30. A
        # short spin costs at most a tenth there, and makes small models on idle cores a fifth faster.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if argv[0] in COMPILING and not {"-h", "--help"} & {*argv}:
        from .caches import use_private_caches

        use_private_caches()
    return importlib.import_module(VERBS[argv[0]][0]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
