"""Who owns what in the engine: the loop, the state, and sizes that let both be read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

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
        targets: list[ast.AST] = []
        if isinstance(node, ast.Assign):
            for target in node.targets:
                targets += target.elts if isinstance(target, ast.Tuple) else [target]
        elif isinstance(node, ast.AugAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            in_place = re.fullmatch(r"[a-z][a-z_]*[a-z]_", node.func.attr)
            targets = [node.func.value] if in_place else []
        yield from (ast.unparse(node) for target in targets if is_state_tensor(target))


def loop_takers(tree: ast.Module) -> Iterator[str]:
    """Functions with an argument that is a Loop, by name or by annotation."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                annotation = ast.unparse(argument.annotation) if argument.annotation else ""
                if argument.arg == "loop" or re.search(r"\bLoop\b", annotation):
                    yield f"{node.name}({argument.arg})"


def attributes(kind: ast.ClassDef) -> set[str]:
    """Attributes that a class sets on `self`, or declares."""
    stored = [node for node in ast.walk(kind) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {*declared(kind), *(node.attr for node in stored if attribute_chain(node) == ["self", node.attr])}


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


def test_sizes():
    """Few attributes, short functions, a core path that is read in half an hour."""
    for name, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and name != STATE:
                assert len(attributes(node)) <= MAX_ATTRIBUTES, f"{name}: {node.name} {sorted(attributes(node))}"
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION, f"{name}: {node.name}"
    listed = re.search(r"The core path, .*?: ([^:]*?)\. ", ast.get_docstring(FILES["__init__.py"]) or "", re.DOTALL)
    core = re.split(r",\s+", listed[1]) if listed else []
    assert {"state.py", "transitions/steps.py", "eager_tick.py", "loop.py"} < {*core}
    assert sum(len((ENGINE / name).read_text().splitlines()) for name in core) <= MAX_CORE_PATH


def test_every_field_of_the_state_has_its_line():
    """Type and dimensions in the annotation; in the comment the meaning, and the transitions that write the field."""
    source = (ENGINE / STATE).read_text().splitlines()
    functions = {
        node.name: ast.unparse(node)
        for name, tree in FILES.items()
        if name.startswith(TRANSITIONS)
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
    lines = [line for line in source if "Annotated[Tensor" in line]
    assert len(lines) == len(fields("RequestState")) + len(fields("LaneState"))
    for line in lines:
        parts = re.fullmatch(r"    (\w+): Annotated\[.*\]  # .+; ([\w, ]+)", line)
        assert parts, line
        named = parts[2].split(", ")
        assert [name for name in named if name not in functions] == [], line
        # `start` sets integers and flags by `start_lanes`.
        writers = {name for name, text in functions.items() if re.search(rf"\b(requests|lanes)\.{parts[1]}\b", text)}
        assert {*named} - {"start"} <= writers, line
