"""A release of vLLM as files that are read and never run: the names in its modules, the attributes of its classes."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from .repository import ROOT

OURS = ("serve", "bench", "tests")


class Release:
    """The release whose package `vllm` lies in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.texts = {path: path.read_text() for path in sorted((folder / "vllm").rglob("*.py"))}
        self.places: dict[str, list[Path]] = {}  # by class
        for path, text in self.texts.items():
            for name in set(re.findall(r"^ *class (\w+)", text, re.MULTILINE)):
                self.places.setdefault(name, []).append(path)

    def file(self, module: str) -> Path | None:
        """The file of `module`."""
        stem = self.folder.joinpath(*module.split("."))
        return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path in self.texts), None)

    @functools.cache  # noqa: B019 - a release lives as long as its test
    def tree(self, path: Path) -> ast.Module:
        """The file `path`, parsed."""
        return ast.parse(self.texts[path])

    @functools.cache  # noqa: B019
    def names(self, module: str) -> frozenset[str]:
        """The names at the top level of `module`, those that it loads when they are asked for included."""
        if (path := self.file(module)) is None:
            return frozenset()
        found = set(_top_level(self.tree(path).body))
        for one in self.tree(path).body:  # `from .file import *`
            if isinstance(one, ast.ImportFrom) and one.names[0].name == "*" and one.level == 1:
                found |= self.names(f"{module}.{one.module}")
        return frozenset(found | set(re.findall(r'^    "(\w+)": (?:"[\w.]*:|lambda)', self.texts[path], re.MULTILINE)))

    def has(self, module: str, name: str) -> bool:
        """True where `from module import name` works."""
        return name in self.names(module) or self.file(f"{module}.{name}") is not None

    @functools.cache  # noqa: B019
    def classes(self, name: str) -> list[ast.ClassDef]:
        """Every class called `name`."""
        trees = [self.tree(path) for path in self.places.get(name, ())]
        return [one for tree in trees for one in ast.walk(tree) if isinstance(one, ast.ClassDef) and one.name == name]

    def fields(self, module: str, name: str) -> set[str]:
        """The annotated fields of class `name` of `module`, but for private ones."""
        path = self.file(module)
        body = self.tree(path).body if path else []
        of = [part for one in body if isinstance(one, ast.ClassDef) and one.name == name for part in one.body]
        named = {part.target.id for part in of if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)}
        return {one for one in named if not one.startswith("_")}

    def attributes(self, name: str) -> set[str]:
        """The attributes of all classes called `name`, and of their bases: of methods, of the class, of `self`."""
        found: set[str] = set()
        for one in self.classes(name):
            for part in ast.walk(one):
                match part:
                    case ast.FunctionDef() | ast.AsyncFunctionDef():
                        found.add(part.name)
                    case ast.Attribute(value=ast.Name(id="self"), attr=attribute):
                        found.add(attribute)
            found.update(_top_level(one.body))
            for base in one.bases:
                named = ast.unparse(base).split("[")[0].split(".")[-1]
                if named != name:
                    found |= self.attributes(named)
        return found


def _top_level(body: list[ast.stmt]) -> Iterator[str]:
    """The names that the statements of a `body` define, also under conditions."""
    for statement in body:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield statement.name
            case ast.Assign():
                yield from (n.id for target in statement.targets for n in ast.walk(target) if isinstance(n, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Import() | ast.ImportFrom():
                yield from ((alias.asname or alias.name).split(".")[0] for alias in statement.names)
            case ast.If() | ast.Try() | ast.With():
                for inner in ("body", "orelse", "handlers", "finalbody"):
                    for part in getattr(statement, inner, ()):
                        yield from _top_level(part.body if isinstance(part, ast.ExceptHandler) else [part])


def imports() -> set[tuple[str, str]]:
    """(module, name) of all that our code imports from vLLM."""
    found = set()
    for folder in OURS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "golden" in path.parts:
                continue
            for one in ast.walk(ast.parse(path.read_text())):
                if isinstance(one, ast.ImportFrom) and one.level == 0 and (one.module or "").split(".")[0] == "vllm":
                    found |= {(one.module or "", alias.name) for alias in one.names}
                elif isinstance(one, ast.Import):
                    for name in (alias.name for alias in one.names if alias.name.startswith("vllm.")):
                        module, _, last = name.rpartition(".")
                        found.add((module, last))
    return found


def relied_upon() -> set[tuple[str, str]]:
    """(class, attribute) of all that LEDGER.md names as `Class.attribute` in its first table."""
    text = (ROOT / "serve/vllm/LEDGER.md").read_text().split("| where")[1].split("## Differences")[0]
    return set(re.findall(r"\b([A-Z]\w*[a-z]\w*)\.([a-z_]\w*)", " ".join(re.findall(r"`([^`]+)`", text))))
