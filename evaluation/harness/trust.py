"""Task files of others: none of their code runs.

Tasks that come with lm-eval are an installed package: their functions run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api import metrics as _registered  # noqa: F401  names of metrics
from lm_eval.api.registry import metric_registry
from lm_eval.tasks._yaml_loader import _Base, load_yaml

from ...aliases import check_aliases, nodes
from ...errors import UserError, shorten
from ...input_files import check_regular

FLAG = "--trust-remote-code"
FUNCTION = "!function"  # lm-eval's tag for a function of a module
# Settings of transformers' generate that name a module to run.
RUNS = ("custom_generate", "trust_remote_code")
# Arguments by which functions of lm-eval's tasks get a tokenizer, whose code they run.
TOKENIZERS = ("tokenizer", "pretrained", "model")


def code_named_in(file: Path, trust: bool) -> list[str]:
    """The code that the task file `file` and those that it includes name: files, installed functions, metrics,
    tokenizers.

    trust: allow it. Raises UserError for code without that, for a mark of lm-eval's tasks that the file takes away, and
    PyYAML's and lm-eval's errors for no task file.
    """
    named = [*_functions(file.resolve(), file.resolve().parent, set(), trust)]
    parts = _tasks_in(load_yaml(file, resolve_func=False))
    if any(part.get("unsafe_code") is False for part in parts):
        raise UserError(
            f"{file}: unsafe_code=false: tasks of lm-eval that run the model's code are marked, which no file takes "
            "away; leave it out"
        )
    named += [f"the hub's module for the metric {name}" for name in _unknown_metrics(parts)]
    named += [f"the code of the tokenizer {name}" for name in _tokenizers(parts)]
    if named and not trust:
        raise UserError(
            f"{file}: names code, which is not run ({shorten(', '.join(dict.fromkeys(named)), 300)}); read it, then "
            f"give {FLAG} to run it"
        )
    return list(dict.fromkeys(named))


def check_runs_nothing(settings: dict[str, Any], task: str) -> None:
    """Raises UserError for a setting of generation that names a module to run."""
    if wrong := next((name for name in RUNS if name in settings), None):
        raise UserError(f"task {task}: generation_kwargs.{wrong} names code for generation, which is not run")


def _functions(file: Path, root: Path, seen: set[Path], trust: bool) -> Iterator[str]:
    """The functions that `file` names, and the files out of the directory `root` that it includes, each a text.

    file, root: resolved, as lm-eval looks beside the file that a link leads to.
    """
    if file in seen:
        return  # lm-eval refuses a cycle
    seen.add(file)
    check_regular(file)
    with file.open("rb") as content:
        node = yaml.compose(content, _Base)
    check_aliases(node)
    for part in nodes(node) if node else ():
        if part.tag == FUNCTION:
            yield _place(str(part.value), file.parent)
    included = load_yaml(file, resolve_func=False, recursive=False).get("include") or []
    for name in included if isinstance(included, list) else [included]:
        inner = (file.parent / str(name)).resolve()
        if not inner.is_relative_to(root):
            yield f"{inner}, which it includes"
        if trust or inner.is_relative_to(root):
            yield from _functions(inner, root, seen, trust)


def _place(function: str, folder: Path) -> str:
    """The file of `function`, as module.name, beside its task file in `folder`; else the installed module's name."""
    module, _, _ = function.rpartition(".")
    file = folder / f"{module.replace('.', '/')}.py"
    return str(file) if file.exists() else f"the installed {function}"


def _unknown_metrics(parts: list[dict[str, Any]]) -> list[str]:
    """Metrics of `parts`, tasks and groups, that lm-eval lacks: Hugging Face's `evaluate` fetches their modules."""
    found: list[str] = []
    for part in parts:
        listed = part.get("metric_list")
        # With process_results, a function, lm-eval only aggregates the metrics of these names. A group's is no reason:
        # its tasks inherit the metrics, and may set that key back.
        counted = _is_group(part) or part.get("process_results") is None
        for one in listed if counted and isinstance(listed, list) else ():
            name = one.get("metric") if isinstance(one, dict) else None
            if isinstance(name, str) and (one.get("hf_evaluate") or name not in metric_registry):
                found.append(repr(name))
    return found


def _tokenizers(parts: list[dict[str, Any]]) -> list[str]:
    """Tokenizers that the group `parts`, or a task in it, gives to functions of lm-eval's tasks; these run its code."""
    if not _is_group(parts[0]):
        return []  # a task of its own has no such function but those that it names
    given = [part.get(key) for part in parts for key in ("metadata", "dataset_kwargs")]
    values = [one[name] for one in given if isinstance(one, dict) for name in TOKENIZERS if name in one]
    return [repr(value) for value in values]


def _is_group(part: dict[str, Any]) -> bool:
    return "group" in part or isinstance(part.get("task"), list)


def _tasks_in(values: Any) -> list[dict[str, Any]]:
    """The mapping `values`, the members of its `task` if it is a group, theirs, and so on."""
    found = [values] if isinstance(values, dict) else []
    for one in found:
        members = one.get("task")
        found += [member for member in members if isinstance(member, dict)] if isinstance(members, list) else []
    return found
