"""The shape of the repository: which way imports point, and the links."""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.code_map import LINKED, PAGE, circles, drawn, imported, imports, map_faults, sources
from tests.helpers.repository import ROOT, git

VERBS = ("convert", "train", "serve", "evaluation")
ABOVE = "evaluation"  # may use the other verbs
# The clients at the top may import everything; nothing may import them.
CLIENTS = ("loopwise.cli", "loopwise.demo", "loopwise.__main__")
# Packages that a travelling checkpoint may import, beside the standard library.
TRAVELS_WITH = ("torch", "transformers")


def named(tree: ast.Module) -> Iterator[str]:
    """Modules of ours that a file names in strings, `package.module` or `package.module:attribute`: lazy imports."""
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and re.fullmatch(r"loopwise(\.\w+)+(:\w+)?", text):
            yield text.partition(":")[0]


def area(module: str) -> str:
    """`convert`, `train`, `serve`, `evaluate`; `client`; `core` for the rest of loopwise; `""` for what is not ours."""
    if module in CLIENTS or module.rpartition(".")[0] in CLIENTS:  # the module, or a name out of it
        return "client"
    top, *rest = module.split(".")
    if top != "loopwise":
        return ""
    return rest[0] if rest and rest[0] in VERBS else "core"


def wrong_way_imports(root: Path) -> list[str]:
    """Imports among our modules that do not point down: core <- convert | train | serve <- evaluate <- clients."""
    wrong = []
    for module, tree in sources(root, "loopwise", *LINKED):
        here = area(module)
        lazy = [] if here == "client" else list(named(tree))
        for target in [*imported(module, tree), *lazy]:
            there = area(target)
            down = there in ("", "core", here) or (here in ("client", ABOVE) and there in VERBS)
            early = module == "loopwise.cli" and there in VERBS
            if not down or early:
                wrong.append(f"{module} imports {target}")
    return wrong


def bare_imports(root: Path) -> list[str]:
    """Imports of `convert`, `train`, `serve` or `recipes` that go past the package, in any file."""
    return [
        f"{module} imports {target}"
        for module, tree in sources(root, "loopwise", *LINKED, "tests", "bench")
        for target in imported(module, tree)
        if target.split(".")[0] in LINKED
    ]


def imports_that_do_not_travel(root: Path) -> list[str]:
    """Imports of the model's files other than torch, transformers, the standard library, `from .sibling import x`."""
    wrong = []
    model = root / "loopwise/model"
    siblings = {path.stem for path in model.glob("*.py")} - {"__init__"}
    wrong += [f"{path} is not flat" for path in model.rglob("*.py") if path.parent != model]
    for module, tree in sources(root, "loopwise/model"):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                if node.level > 1 or node.module not in siblings:
                    wrong.append(f"{module} imports {ast.unparse(node)}")
            elif isinstance(node, ast.Import | ast.ImportFrom):
                tops = {name.split(".")[0] for name in imported(module, ast.Module([node], []))}
                if tops - {*TRAVELS_WITH, *sys.stdlib_module_names}:
                    wrong.append(f"{module} imports {ast.unparse(node)}")
    return wrong


def called_imports(tree: ast.Module) -> Iterator[str]:
    """Names of modules in calls of import_module and __import__."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            yield from (part.value for part in node.args if isinstance(part, ast.Constant) and type(part.value) is str)


def vllm_imports_outside(root: Path) -> list[str]:
    """Imports of vLLM in files outside of serve/vllm, lazy ones and names of modules in strings included."""
    wrong = []
    for module, tree in sources(root, "loopwise", *LINKED):
        if not module.startswith("loopwise.serve.vllm."):
            strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
            lazy = [text for text in strings if isinstance(text, str) and re.fullmatch(r"vllm(\.\w+)+(:\w+)?", text)]
            lazy += [text for text in called_imports(tree) if text == "vllm"]
            targets = [name for name in imported(module, tree) if name.split(".")[0] == "vllm"]
            wrong += [f"{module} imports {target}" for target in [*targets, *lazy]]
    return wrong


def circular_imports(root: Path) -> list[str]:
    """Groups of our files that import each other in a circle, type-only imports included."""
    return [" <-> ".join(circle) for circle in circles(imports(root))]


def imports_of_test_modules(root: Path) -> list[str]:
    """Imports of test modules and of conftest files in tests and bench, names of modules in strings included."""
    wrong = []
    for module, tree in sources(root, "tests", "bench"):
        strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        lazy = [text for text in strings if isinstance(text, str) and re.fullmatch(r"tests(\.\w+)+(:\w+)?", text)]
        for target in [*imported(module, tree), *lazy]:
            # A test's own folder is on the path, too: `from test_x import y` works there.
            if re.match(r"(tests\.(\w+\.)*)?(test_\w+|conftest)\b", target):
                wrong.append(f"{module} imports {target}")
    return wrong


VIOLATIONS = [
    wrong_way_imports,
    bare_imports,
    imports_that_do_not_travel,
    circular_imports,
    map_faults,
    vllm_imports_outside,
    imports_of_test_modules,
]


@pytest.mark.parametrize("violations", VIOLATIONS)
def test_imports(violations):
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("violations", "path", "line"),
    [
        (wrong_way_imports, "train/a.py", "from ..convert.plan import Plan"),
        (wrong_way_imports, "train/a.py", "from .. import convert"),
        (wrong_way_imports, "serve/a.py", "from ..evaluation import loss"),
        (wrong_way_imports, "train/a.py", "def f():\n    import loopwise.convert.plan"),
        (wrong_way_imports, "serve/vllm/__init__.py", "from ...train import data"),
        (wrong_way_imports, "serve/a.py", "MODULE = 'loopwise.convert.plan:Plan'"),
        (wrong_way_imports, "loopwise/errors.py", "from .serve import recipe"),
        (wrong_way_imports, "loopwise/model/a.py", "from ..train import data"),
        (wrong_way_imports, "convert/a.py", "from ..cli import main"),
        (wrong_way_imports, "recipes/__init__.py", "from loopwise.train import data"),
        (wrong_way_imports, "loopwise/cli.py", "from .train import command"),
        (circular_imports, "convert/recipe.py", "from .plan import Plan"),
        (circular_imports, "loopwise/errors.py", "if TYPE_CHECKING:\n    from .unused import check_used"),
        (vllm_imports_outside, "serve/engine/a.py", "import vllm"),
        (vllm_imports_outside, "serve/server.py", "def f():\n    from vllm.platforms import current_platform"),
        (vllm_imports_outside, "serve/api/a.py", "if TYPE_CHECKING:\n    from vllm import SamplingParams"),
        (vllm_imports_outside, "loopwise/a.py", "import_module('vllm.engine')"),
        (vllm_imports_outside, "serve/api/a.py", "def f():\n    importlib.import_module('vllm')"),
        (vllm_imports_outside, "serve/offline.py", "def f():\n    __import__('vllm')"),
        (map_faults, "convert/a.py", ""),
        (map_faults, "loopwise/errors.py", "from .unused import check_used"),
        (map_faults, "serve/engine/state.py", "from .loop import Loop"),
        (map_faults, "train/tasks/hops.py", "from ..run import train"),
        (map_faults, "serve/vllm/arrivals.py", "from .worker import LaneWorker"),
        (bare_imports, "tests/a.py", "import train"),
        (bare_imports, "bench/a.py", "from convert.plan import Plan"),
        (bare_imports, "serve/a.py", "def f():\n    from recipes import x"),
        (imports_of_test_modules, "tests/serve/test_a.py", "from tests.serve import test_b"),
        (imports_of_test_modules, "tests/serve/test_a.py", "from tests.serve.test_b import build"),
        (imports_of_test_modules, "tests/serve/test_a.py", "import tests.serve.test_b as other"),
        (imports_of_test_modules, "tests/serve/test_a.py", "from .test_b import build"),
        (imports_of_test_modules, "tests/serve/test_a.py", "from . import test_b"),
        (imports_of_test_modules, "tests/serve/test_a.py", "from test_b import build"),
        (imports_of_test_modules, "tests/serve/test_a.py", "def f():\n    from tests.train.conftest import WORDS"),
        (imports_of_test_modules, "tests/serve/test_a.py", "from conftest import WORDS"),
        (imports_of_test_modules, "tests/serve/test_a.py", "import_module('tests.serve.test_b')"),
        (imports_of_test_modules, "tests/helpers/a.py", "from tests.serve.test_b import build"),
        (imports_of_test_modules, "bench/a.py", "from tests.serve.test_b import build"),
        (imports_that_do_not_travel, "loopwise/model/a.py", "import safetensors"),
        (imports_that_do_not_travel, "loopwise/model/a.py", "from ..errors import UserError"),
        (imports_that_do_not_travel, "loopwise/model/a.py", "from . import injection"),
        (imports_that_do_not_travel, "loopwise/model/a.py", "from .missing import x"),
        (imports_that_do_not_travel, "loopwise/model/nested/a.py", "import torch"),
    ],
)
def test_a_planted_violation_is_found(violations, path, line, tmp_path):
    """Each check sees the fault it is there for, in a copy of the real tree; test_imports sees none in the tree."""
    for folder in ("loopwise", *LINKED):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text((target.read_text() if target.exists() else "") + f"\n{line}\n")
    assert len(violations(tmp_path)) >= 1


def test_the_page_of_the_architecture_is_that_of_the_code(tmp_path):
    """Its pictures are drawn from today's imports, and every file that it names exists."""
    page = PAGE.read_text(encoding="utf-8")
    assert drawn(page, ROOT) == page, "draw the pictures anew: python docs/code_map.py"
    assert page.count("-->") > 60
    engine = ("", "serve/engine/")
    named = re.findall(r"`([\w/]+(?:\.py|/))`", page)
    assert [name for name in named if not any((ROOT / folder / name).exists() for folder in engine)] == []
    copy = tmp_path / "loopwise"
    shutil.copytree(ROOT / "loopwise", copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in LINKED:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "serve/memory.py").write_text("from ..cli import main\n")
    assert drawn(page, tmp_path) != page, "another import draws another picture"


def test_no_function_has_more_than_60_lines():
    functions = (
        (module, node)
        for module, tree in sources(ROOT, "loopwise", *LINKED)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    sizes = {f"{module}: {node.name}": (node.end_lineno or 0) - node.lineno + 1 for module, node in functions}
    assert {name: size for name, size in sizes.items() if size > 60} == {}
    assert max(sizes.values()) > 50


def test_no_two_files_of_tests_have_one_name():
    """Folders of tests are no packages: pytest imports one of the two alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) > 150
    assert {name for name in names if names.count(name) > 1} == set()


def test_the_command_names_modules_that_exist():
    from loopwise.cli import VERBS as verbs

    for module, _ in verbs.values():
        path = ROOT / (module.replace(".", "/") + ".py")
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert "main" in functions, f"{module} has no main"


@pytest.mark.parametrize("name", LINKED)
def test_links_are_committed_as_links(name):
    assert os.readlink(ROOT / "loopwise" / name) == f"../{name}"
    assert (ROOT / name).is_dir()
    (entry,) = git("ls-files", "--stage", f"loopwise/{name}")
    assert entry.startswith("120000 ")
