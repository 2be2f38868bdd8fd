"""Who owns what in the engine: the loop, the state, and sizes that let both be read."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loopwise.serve import DiffusionSettings, Engine, Params
from loopwise.serve.engine.state import State
from tests.helpers.engines import build, build_routed
from tests.helpers.graph_ticks import run_once

ENGINE = Path(__file__).parents[3] / "serve/engine"
LOOP, TRANSITIONS, STATE = "loop.py", "transitions/", "state.py"
MAX_ATTRIBUTES, MAX_FUNCTION, MAX_CORE_PATH = 20, 60, 1400
FILES = {path.relative_to(ENGINE).as_posix(): ast.parse(path.read_text()) for path in sorted(ENGINE.rglob("*.py"))}


def declared(kind: ast.ClassDef) -> Iterator[str]:
    """Names that a class declares with a type."""
    for node in kind.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def fields(kind: str) -> set[str]:
    """Fields of a dataclass of state.py."""
    (found,) = [node for node in FILES[STATE].body if isinstance(node, ast.ClassDef) and node.name == kind]
    return set(declared(found))


def attribute_chain(node: ast.AST) -> list[str]:
    """`a.b.c[d]` -> [a, b, c]."""
    if isinstance(node, ast.Subscript):
        return attribute_chain(node.value)
    if isinstance(node, ast.Attribute):
        return [*attribute_chain(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else []


def is_state_tensor(node: ast.AST) -> bool:
    """The node is a tensor of a State, or a part of one."""
    chain = attribute_chain(node)
    owners = {"requests": fields("RequestState"), "lanes": fields("LaneState"), "state": {"turn"}}
    return any(name in owners.get(owner, ()) for owner, name in pairwise(chain))


def writes(tree: ast.Module) -> Iterator[str]:
    """Assignments to a State's tensors, and calls of their methods that work in place."""
    for node in ast.walk(tree):
        yield from (ast.unparse(node) for target in targets_of(node) if is_state_tensor(target))


def targets_of(node: ast.AST) -> list[ast.AST]:
    """The expressions that a statement assigns to, or the object of a call that works in place."""
    targets: list[ast.AST] = []
    if isinstance(node, ast.Assign):
        for target in node.targets:
            targets += target.elts if isinstance(target, ast.Tuple) else [target]
    elif isinstance(node, ast.AugAssign):
        targets = [node.target]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        in_place = re.fullmatch(r"[a-z][a-z_]*[a-z]_", node.func.attr)
        targets = [node.func.value] if in_place else []
    return targets


def loop_takers(tree: ast.Module) -> Iterator[str]:
    """Functions with an argument that is a Loop, by name or by annotation."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            given = node.args
            every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
            for argument in [argument for argument in every if argument]:
                annotation = ast.unparse(argument.annotation) if argument.annotation else ""
                if argument.arg == "loop" or re.search(r"\bLoop\b", annotation):
                    yield f"{getattr(node, 'name', 'lambda')}({argument.arg})"


def attributes(kind: ast.ClassDef) -> set[str]:
    """Attributes that a class sets on `self`, or declares; those of its base classes in serve/engine, too."""
    stored = [node for node in ast.walk(kind) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    found = {*declared(kind), *(node.attr for node in stored if attribute_chain(node) == ["self", node.attr])}
    bases = {base.id for base in kind.bases if isinstance(base, ast.Name)}
    classes = [node for tree in FILES.values() for node in tree.body if isinstance(node, ast.ClassDef)]
    return found.union(*(attributes(other) for other in classes if other.name in bases))


def test_nobody_but_its_own_file_takes_the_loop():
    takers = {name: list(loop_takers(tree)) for name, tree in FILES.items() if name != LOOP}
    assert {name: found for name, found in takers.items() if found} == {}


def test_only_transitions_write_the_state():
    allowed = (TRANSITIONS, STATE)
    found = {name: list(writes(tree)) for name, tree in FILES.items() if not name.startswith(allowed)}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert sum(len(list(writes(tree))) for name, tree in FILES.items() if name.startswith(TRANSITIONS)) > 50


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("state.lanes.running[which] = False", 1),
        ("lanes.s[a], other = x, y", 1),
        ("self.state.requests.count.zero_()", 1),
        ("requests.phase += 1", 1),
        ("state.turn[1] = row", 1),
        ("lanes.s.index_put_((which,), after)", 1),
        ("x = lanes.s[which]", 0),
        ("lanes.s[which].sum()", 0),
        ("self.order = None", 0),
    ],
)
def test_a_write_is_seen(code, count):
    assert len(list(writes(ast.parse(code)))) == count


class Writes(TorchDispatchMode):
    """Notes every operation that writes a tensor of `state`, with no function of transitions/ on the stack."""

    def __init__(self, state: State):
        super().__init__()
        held = {"turn": state.turn, **vars(state.requests), **vars(state.lanes)}
        self.names = {tensor.untyped_storage().data_ptr(): name for name, tensor in held.items()}
        self.inside: set[str] = set()
        self.outside: set[tuple[str, str]] = set()  # (tensor, file of the innermost function)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | (kwargs or {})
        for argument in func._schema.arguments:
            tensor = values.get(argument.name)
            if argument.is_write and isinstance(tensor, torch.Tensor):
                self._note(self.names.get(tensor.untyped_storage().data_ptr()))
        return func(*args, **(kwargs or {}))

    def _note(self, name: str | None) -> None:
        if name is None:
            return
        files, frame = [], sys._getframe(2)
        while frame:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        if any("serve/engine/transitions/" in file for file in files):
            self.inside.add(name)
        else:
            self.outside.add((name, next(file for file in files if "loopwise/serve" in file or file == __file__)))


RUNS: dict[str, dict[str, Any]] = {
    "plain": {"exit_rule": "kl", "exit_threshold": 0.3, "temperature": 1.0},
    "wave": {"decoder": "wave", "max_in_flight": 3},
    "diffusion": {"decoder": "diffusion", "max_in_flight": 3, "diffusion": DiffusionSettings(2, noise=0.1)},
    "graph ticks": {"exit_rule": "latent-diff", "exit_threshold": 0.5},
    "router": {},
}


@pytest.mark.parametrize("name", RUNS)
def test_only_transitions_write_the_state_while_requests_run(name):
    routed = name == "router"
    model = build_routed("token") if routed else build()
    engine = Engine(model, max_num_seqs=2, max_model_len=40, passes_per_step=5, max_in_flight=1 if routed else 3)
    if name == "graph ticks":
        engine.loop.use_graphs(run_once)
    params = Params(8, num_recurrences=3 if routed else 4, ignore_eos=True, **RUNS[name])
    with Writes(engine.loop.state) as seen:
        engine.generate([[5, 6, 7], [8], [9] * 20], params)
    assert seen.outside == set()
    assert {
        "turn",
        "s",
        "row",
        "running",
        "waiting",
        "forced_depths",
        "tokens",
        "count",
        "live",
        "stops",
    } <= seen.inside
    with seen, torch.inference_mode():
        lanes = engine.loop.state.lanes
        lanes.s.view(-1)[:1].zero_()  # by a view, which the names above do not show
        torch.add(lanes.depth, 1, out=lanes.depth)
    assert seen.outside == {("s", __file__), ("depth", __file__)}


def test_sizes():
    """Few attributes, short functions, a core path that is read in half an hour."""
    for name, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and name != STATE:
                assert len(attributes(node)) <= MAX_ATTRIBUTES, f"{name}: {node.name} {sorted(attributes(node))}"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION, f"{name}: {node.name}"
    listed = re.search(r"The core path, .*?: ([^:]*?)\. ", ast.get_docstring(FILES["__init__.py"]) or "", re.DOTALL)
    core = re.split(r",\s+", listed[1]) if listed else []
    assert {"state.py", "transitions/steps.py", "eager_tick.py", "loop.py"} < {*core}
    assert sum(len((ENGINE / name).read_text().splitlines()) for name in core) <= MAX_CORE_PATH


def test_every_field_of_the_state_has_its_line():
    """Type and dimensions in the annotation; in the comment the meaning, and all transitions that write the field.

    A name of a file stands for its functions. `clear_flags` is named once, in the docstring.
    """
    source = (ENGINE / STATE).read_text().splitlines()
    functions = {
        node.name: (name.removeprefix(TRANSITIONS), node)
        for name, tree in FILES.items()
        if name.startswith(TRANSITIONS)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name != "clear_flags"
    }
    lines = [line for line in source if "Annotated[Tensor" in line]
    assert len(lines) == len(fields("RequestState")) + len(fields("LaneState"))
    for line in lines:
        parts = re.fullmatch(r"    (\w+): Annotated\[.*\]  # .+; ([\w., ]+)", line)
        assert parts, line
        named = {*parts[2].split(", ")}
        assert named - functions.keys() <= {file for file, _ in functions.values()}, line
        owner = "requests" if source.index(line) < source.index("class LaneState:") else "lanes"
        writers = {name for name, (_, node) in functions.items() if owner + "." + parts[1] in written(node)}
        of_files = {name for name in writers if functions[name][0] in named}
        # `start` sets integers and flags by `start_lanes`, which `append_to_window` calls, too.
        starts = {"start": "start_lanes"} if "start_lanes" in writers else {}
        assert {starts.get(name, name) for name in named if not name.endswith(".py")} == writers - of_files, line
        assert {file for file in named if file.endswith(".py")} == {functions[name][0] for name in of_files}, line


def written(function: ast.FunctionDef) -> set[str]:
    """Tensors `owner.field` that a transition writes, those that it writes in a loop over a tuple of them included."""
    nodes = [target for node in ast.walk(function) for target in targets_of(node)]
    for node in ast.walk(function):
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            nodes += [
                part for item in node.iter.elts for part in (item.elts if isinstance(item, ast.Tuple) else [item])
            ]
    chains = [attribute_chain(node) for node in nodes if is_state_tensor(node)]
    return {
        ".".join(chain[n : n + 2]) for chain in chains for n in range(len(chain)) if chain[n] in ("requests", "lanes")
    }
