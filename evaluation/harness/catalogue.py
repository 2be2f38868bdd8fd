"""Names and files in `tasks` as tasks of lm-eval, with errors of one line."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from ...errors import UserError, nearest, reason, shorten
from ...hub import UNREACHED
from .faults import one_line
from .local import is_short, located, read_short
from .templates import sandbox_tasks
from .trust import FLAG, code_named_in

FILES = (".yaml", ".yml", ".jsonl")
SHOTS = 1000  # solved examples that the hash of a task covers
# Modules of lm-eval's tasks that evaluate an answer as Python, by sympy's parse_expr, though no key says so.
EVALUATING = ("lm_eval.tasks.score.math.utils_math",)


@dataclass
class Catalogue:
    """tasks: lm-eval's tasks by name, in the order that was asked for.   groups: those of them that are one score.

    of_files: names of those out of task files.
    """

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    of_files: set[str] = field(default_factory=set)

    def faults(self, name: str) -> AbstractContextManager[None]:
        """A block of work on the task or group `name`, whose errors are one line if it is of a file."""
        return one_line(name) if name in self.of_files else nullcontext()


def load_tasks(names: list[str], trust: bool = False) -> Catalogue:
    """The tasks that `names` stand for: lm-eval's names of tasks, groups and tags, with * for any letters; files.

    trust: run the code that these files name, and print its names before. Raises UserError for an unknown name, a wrong
    file, one that names code without `trust`, data that need a network where there is none, and tasks that run the
    model's code or show images.
    """
    sandbox_tasks()
    read = [None if _registered(name) else _read(Path(name).expanduser(), trust) for name in names]
    if trust:
        code = [name for one in read if one for name in one[0]]
        print(f"{FLAG}: {', '.join(code)} will run" if code else f"{FLAG}: no file to run", file=sys.stderr, flush=True)
    files = [None if one is None else one[1]() for one in read]
    manager = TaskManager(include_defaults=any(file is None or _names_tasks(file) for file in files))
    found = Catalogue()
    for name, file in zip(names, files, strict=True):
        for spec in _matching(manager, name) if file is None else [file]:
            loaded = _load(manager, name, spec)
            if twice := next((task for task in loaded["tasks"] if task in found.tasks), None):
                raise UserError(f"tasks={','.join(names)}: two of them hold a task named {twice!r}")
            found.tasks |= loaded["tasks"]
            found.groups |= loaded.get("groups", {})
            found.of_files |= set() if file is None else {*loaded["tasks"], *loaded.get("groups", {})}
    for name, task in found.tasks.items():
        if _runs_answers(task):
            raise UserError(f"task {name} runs code that the model writes, and Loopwise does not; use lm-eval itself")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name} shows images or sound, and Loopwise's models read text alone")
    return found


def fingerprint(task: Any) -> str:
    """A hash of a task's config, questions, and solved examples (the first SHOTS of them)."""
    digest = hashlib.sha256()
    shots = itertools.islice(task.fewshot_docs() or [], SHOTS)
    for part in itertools.chain([task.dump_config()], task.eval_docs, shots):
        digest.update(json.dumps(part, sort_keys=True, default=_named).encode())
    return digest.hexdigest()[:16]


def _runs_answers(task: Any) -> bool:
    """True for a task that runs the model's answers as code."""
    scores = task.get_config("process_results") if hasattr(task, "get_config") else None
    return getattr(task, "UNSAFE_CODE", False) or getattr(scores, "__module__", None) in EVALUATING


def _named(value: Any) -> str:
    """A name for what is no JSON, the same in every process."""
    return getattr(value, "__qualname__", type(value).__qualname__)


def _registered(name: str) -> bool:
    """True for a name, False for a path."""
    return not (name.endswith(FILES) or "/" in name)


def _matching(manager: TaskManager, name: str) -> list[str]:
    found = manager.match_tasks([name]) if "*" in name else [name] if name in manager.all_tasks else []
    if not found:
        near = [] if "*" in name else nearest(name, manager.all_tasks)
        hint = f"did you mean {near[0]!r}? " if near else ""
        others = f"near it are {', '.join(near[1:])}; " if near[1:] else ""
        raise UserError(
            f"unknown task {name!r}: {hint}{others}`lm-eval ls tasks` lists all; a file of your own ends in "
            f"{' or '.join(FILES[::2])}"
        )
    return found


def _read(file: Path, trust: bool) -> tuple[list[str], Callable[[], dict[str, Any]]]:
    """(names of the code in `file`, which `trust` allows; a function that gives the config of its task or group).

    That function imports this code. Both raise UserError for a wrong file.
    """
    if not file.is_file():
        raise UserError(f"tasks={file}: no such file")
    if file.suffix == ".jsonl":
        return [], partial(read_short, file)
    try:
        named = code_named_in(file, trust)
        values = load_yaml(file, resolve_func=False)
    except UserError:
        raise
    except Exception as error:  # PyYAML's, and those of lm-eval for includes
        raise UserError(f"{file}: not a task file ({reason(error)})") from None
    if is_short(values):
        return named, partial(read_short, file)
    members = values.get("task")
    if "group" in values and not isinstance(members, list):
        raise UserError(
            f"{file}: task={shorten(repr(members), 200)}: the list of a group's tasks, by name or with their config"
        )
    if "group" not in values and not isinstance(members, str):
        raise UserError(f"{file}: no key 'data' (short form) or 'task' (lm-eval's) in it")
    return named, partial(_full, file, bool(named))


def _full(file: Path, functions: bool) -> dict[str, Any]:
    """The lm-eval config in `file`, with its `functions` if there are some. Raises UserError where they fail."""
    try:
        config = load_yaml(file, resolve_func=functions)
        if "group" not in config:
            return located(file, config)
        tasks = [located(file, task) if isinstance(task, dict) else task for task in config["task"]]
        return {**config, "task": tasks}
    except Exception as error:  # those of the functions' modules
        raise UserError(f"{file}: its functions cannot be imported ({reason(error)})") from None


def _names_tasks(config: dict[str, Any]) -> bool:
    """True for the config of a group that has tasks of lm-eval by name."""
    return "group" in config and not all(isinstance(task, dict) for task in config["task"])


def _load(manager: TaskManager, name: str, spec: str | dict[str, Any]) -> Any:
    try:
        if isinstance(spec, dict) and "group" in spec:  # of a group's path, lm-eval takes the list of tasks for a name
            entry = Entry(spec["group"], Kind.GROUP, None, spec)
            group: Any = TaskFactory().build(entry, registry=manager.task_index)
            return manager.load([group])
        return manager.load([spec])
    except UserError:
        raise
    except Exception as error:  # of lm-eval, datasets, the hub and tasks' own modules
        if any(type(one).__name__.endswith(UNREACHED) for one in _chain(error)):
            raise UserError(
                f"task {name}: its data are not on this machine, and the network cannot be reached ({reason(error)})"
            ) from error
        raise UserError(f"task {name}: cannot be loaded ({type(error).__name__}: {reason(error)})") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
