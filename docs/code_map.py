"""The imports among files, and the map in every package's docstring. `python docs/code_map.py` draws the pictures.

A package's map lists its files in reading order, one line each: `    name.py    its subject`, or `    name/` for a
package inside it. A file imports only files above it in the map. tests/test_layout.py checks both.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

LINKED = ("convert", "train", "serve", "evaluation", "recipes")  # folders at the top that loopwise/ links to
LINE = re.compile(r"^ *(\w+)(?:\.py|/) {2,}\S", re.MULTILINE)


def module_name(path: Path) -> str:
    """`convert/plan.py` -> `loopwise.convert.plan`; `convert/__init__.py` -> `loopwise.convert.__init__`."""
    parts = path.with_suffix("").parts
    return ".".join(("loopwise", *parts) if parts[0] in LINKED else parts)


def sources(root: Path, *folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Module name and syntax tree of every Python file in `folders`, each file once, where it really stands."""
    for folder in folders:
        for directory, _, names in os.walk(root / folder):  # does not follow links
            for name in sorted(names):
                path = Path(directory, name)
                if path.suffix == ".py":
                    yield module_name(path.relative_to(root)), _parsed(path.read_text(encoding="utf-8"))


@cache
def _parsed(text: str) -> ast.Module:
    """The syntax tree of a file with this text. Checks of copies of the repository read most texts many times."""
    return ast.parse(text)


@cache
def imported(module: str, tree: ast.AST) -> tuple[str, ...]:
    """Absolute names of all imports of a module, type-only ones included; `from a import b` gives `a.b`."""
    return tuple(_imported(module, tree))


def _imported(module: str, tree: ast.AST) -> Iterator[str]:
    package = module.split(".")[:-1]  # package of a file and of an __init__ alike
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def imports(root: Path) -> dict[str, set[str]]:
    """The modules of ours that each module of ours imports. A package counts as its `__init__`."""
    trees = dict(sources(root, "loopwise", *LINKED))

    def module(name: str) -> str | None:
        for known in (name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__"):
            if known in trees:
                return known
        return None

    graph = {}
    for name, tree in trees.items():
        targets = {module(target) for target in imported(name, tree)}
        graph[name] = {target for target in targets if target and target != name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a circle (strongly connected components, Tarjan 1972), sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)


def package_map(tree: ast.Module) -> list[str]:
    """The names of a package's map, in reading order; empty for a docstring without a map."""
    return LINE.findall(ast.get_docstring(tree, clean=False) or "")


def map_faults(root: Path) -> list[str]:
    """Files that a package's map lacks or lists without need, and imports that point up in the map."""
    trees = dict(sources(root, "loopwise", *LINKED))
    graph = imports(root)
    faults = []
    for package in sorted(name.removesuffix(".__init__") for name in trees if name.endswith(".__init__")):
        order = package_map(trees[f"{package}.__init__"])
        prefix = f"{package}."
        inside = {name.removeprefix(prefix).split(".")[0] for name in trees if name.startswith(prefix)} - {"__init__"}
        faults += [f"the map of {package} lists {name} twice" for name in sorted(set(order)) if order.count(name) > 1]
        faults += [f"the map of {package} lists {name}, which it lacks" for name in order if name not in inside]
        faults += [f"the map of {package} lacks {name}" for name in sorted(inside - set(order))]
        place = {name: i for i, name in enumerate(order)}
        for module, targets in graph.items():
            here = module.removeprefix(prefix).split(".")[0]
            for target in targets if module.startswith(prefix) else ():
                there = target.removeprefix(prefix).split(".")[0]
                if target == f"{package}.__init__" and here != "__init__":
                    faults.append(f"{module} imports {target}, the package around it")
                elif target.startswith(prefix) and place.get(there, 0) > place.get(here, len(order)):
                    faults.append(f"{module} imports {target}, which stands below it in the map of {package}")
    return faults


# ---- pictures -------------------------------------------------------------------------------------------------------
PAGE = Path(__file__).parent / "architecture.md"
FENCE = re.compile(r"(<!-- drawn: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Boxes of the first picture; serve is drawn entry by entry.
ROOMS = ("convert", "train", "evaluation", "model", "demo", "cli")


def rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports among the packages; entry points are left out, as they import everything."""

    def room(module: str) -> str:
        _, first, *rest = module.split(".")
        if first == "serve":
            return f"serve/{rest[0]}"
        return first if first in ROOMS else "core"

    drawn: dict[str, set[str]] = {}
    for module, targets in graph.items():
        inside = {target for target in targets if not target.endswith(("__init__", "__main__"))}
        if not module.endswith(("__init__", "__main__")):
            here = drawn.setdefault(room(module), set())
            here |= {room(target) for target in inside} - {room(module)}
    return drawn


def engine(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports among files and packages of serve/engine."""
    prefix = "loopwise.serve.engine."

    def place(module: str) -> str:
        return module.removeprefix(prefix).split(".")[0]

    drawn: dict[str, set[str]] = {}
    for module, targets in graph.items():
        if module.startswith(prefix) and place(module) != "__init__":
            here = drawn.setdefault(place(module), set())
            here |= {place(target) for target in targets if target.startswith(prefix)} - {place(module), "__init__"}
    return drawn


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """`graph` without the arrows that follow from others. Circles are left as they are."""

    def reached(start: str) -> set[str]:
        seen, left = set[str](), [start]
        while left:
            for target in graph.get(left.pop(), set()) - seen:
                seen.add(target)
                left.append(target)
        return seen

    below = {node: reached(node) for node in graph}

    def follows(node: str, target: str) -> bool:
        others = graph[node] - {target}
        return any(target in below.get(other, ()) and node not in below.get(other, ()) for other in others)

    return {node: {target for target in targets if not follows(node, target)} for node, targets in graph.items()}


def picture(graph: dict[str, set[str]]) -> str:
    """A Mermaid diagram: an arrow from each room to those that it imports."""
    lines = ["```mermaid", "graph TD"]
    for node, targets in sorted(reduced(graph).items()):
        name = node.removeprefix("loopwise.").replace(".", "/")
        lines += [f"    {name} --> {target.removeprefix('loopwise.').replace('.', '/')}" for target in sorted(targets)]
    return "\n".join([*lines, "```"])


def drawn(page: str, root: Path) -> str:
    """The page with its pictures drawn anew from the imports under `root`."""
    graph = imports(root)
    pictures = {"rooms": rooms, "engine": engine}
    return FENCE.sub(lambda found: f"{found[1]}{picture(pictures[found[2]](graph))}\n{found[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8"), PAGE.parents[1]), encoding="utf-8")
