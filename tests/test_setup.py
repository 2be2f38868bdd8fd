"""The Makefile's environment, with stand-ins for Python and pip: what is fetched from where, and what is made anew."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from supply.locks import read
from tests.helpers.repository import ROOT

# A Python of version $VERSION, which `-m venv` copies into the environment beside a pip that notes how it is called.
# pip fails where its arguments match the extended regular expression $FAIL.
PYTHON = r"""#!/bin/bash
case "$*" in
  *version_info*) echo VERSION ;;
  *_base_executable*) echo "BASE" ;;
  "-m venv "*)
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$(dirname "BASE")/pip" "$3/bin/pip" ;;
  *) exit 9 ;;
esac
"""
PIP = r"""#!/bin/bash
echo "$*" >> "$CALLS"
[[ -n $FAIL && "$*" =~ $FAIL ]] && { echo "ERROR: no matching distribution" >&2; exit 1; }
exit 0
"""
# Tools that the Makefile may use. No Python of this machine is found beside the stand-ins.
SYSTEM = ("make", "bash", "sh", "grep", "sed", "ls", "mkdir", "touch", "rm", "find", "cp", "dirname")
PYTORCH = "https://download.pytorch.org/whl/cpu"


class Machine:
    """A folder with the Makefile, and stand-ins in `bin` for all that it runs beyond the system's own commands."""

    def __init__(self, root: Path):
        self.root, self.calls = root / "a clone", root / "calls"
        self.root.mkdir()
        for name in ("Makefile", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        shutil.copytree(ROOT / "supply", self.root / "supply")
        self.bin = root / "bin"
        self.bin.mkdir()
        self.program("pip", PIP)
        for version in ("3.10", "3.11", "3.12", "3.14"):
            name = f"python{version}"
            self.program(name, PYTHON.replace("VERSION", version).replace("BASE", str(self.bin / name)))
        for name in SYSTEM:
            (self.bin / name).symlink_to(str(shutil.which(name)))

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def make(self, *arguments: str, fail: str = "") -> tuple[int, list[str], str]:
        """Exit code of make, how pip was called, and the last line on stderr that is not make's own."""
        self.calls.write_text("")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "PY", "GPU"))}
        env = {**kept, "PATH": str(self.bin), "CALLS": str(self.calls), "FAIL": fail}
        done = subprocess.run(["make", *arguments], cwd=self.root, env=env, capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
        return done.returncode, self.calls.read_text().splitlines(), lines[-1] if lines else ""

    def age(self) -> None:
        """The environment was made before the pins that are now listed."""
        for stamp in (self.root / ".venv").glob(".[ds]e*"):
            os.utime(stamp, (0, 0))

    def version(self) -> str:
        match = re.search(r"echo (3\.\d+)", (self.root / ".venv/bin/python").read_text())
        assert match
        return match[1]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


TORCH = "install --no-deps -r .venv/torch.txt"
REST = [
    "install --no-deps --require-hashes -r .venv/setuptools.txt",
    "install --no-deps --no-build-isolation --require-hashes -r supply/cpu.txt",
    "install --no-deps --no-build-isolation -e .",
]


def test_torch_comes_from_where_pip_looks(machine):
    assert machine.make("setup") == (0, [TORCH, *REST], "")
    lines = (machine.root / ".venv/torch.txt").read_text().splitlines()
    assert lines
    assert all(line.startswith("torch==") for line in lines)
    (builder,) = read(machine.root / ".venv/setuptools.txt")
    assert builder in read(machine.root / "supply/cpu.txt")
    assert builder.hashes
    assert machine.make("setup") == (0, [], "")


@pytest.mark.parametrize(("given", "index"), [([], PYTORCH), (["TORCH_INDEX=http://host/cpu"], "http://host/cpu")])
def test_torch_and_nothing_else_comes_from_its_own_index(machine, given, index):
    code, calls, _ = machine.make("setup", *given, fail=r"torch\.txt$")
    assert (code, calls) == (0, [TORCH, f"{TORCH} --index-url {index}", *REST])


@pytest.mark.parametrize(("fail", "said"), [(r"torch\.txt", PYTORCH), ("cpu.txt", "pip says why above")])
def test_what_cannot_be_fetched_is_one_line_and_is_begun_anew(machine, fail, said):
    code, _, line = machine.make("setup", fail=fail)
    assert code
    assert said in line
    leftover = machine.root / ".venv/leftover"
    leftover.touch()
    assert machine.make("setup") == (0, [TORCH, *REST], "")
    assert not leftover.exists()
    assert machine.make("setup") == (0, [], "")


def test_new_pins_come_into_the_environment_that_is_there(machine):
    machine.make("setup")
    (machine.root / ".venv/kept").touch()
    machine.age()
    assert machine.make("setup") == (0, [TORCH, *REST], "")
    assert (machine.root / ".venv/kept").exists()


@pytest.mark.parametrize(
    ("python", "said"),
    [("python3.10", "python3.10 is 3.10:"), ("python3.14", "python3.14 is 3.14:"), ("nowhere", "nowhere is no Python")],
)
def test_other_pythons_are_refused_by_name(machine, python, said):
    code, calls, line = machine.make("setup", f"PYTHON={python}")
    assert (code, calls) == (2, [])
    assert "needs Python 3.11, 3.12 or 3.13" in line
    assert said in line
    assert not (machine.root / ".venv").exists()


def test_a_machine_without_python(machine):
    for version in ("3.11", "3.12"):
        (machine.bin / f"python{version}").unlink()
    machine.program("python3", "#!/bin/bash\nexit 127\n")  # a version manager's stand-in for one that is not chosen
    code, _, line = machine.make("setup")
    assert code
    assert "python3 is no Python that runs: name one with PYTHON=" in line


def test_the_environment_remembers_its_python_until_another_is_named(machine):
    machine.make("setup", "PYTHON=python3.12")
    assert machine.version() == "3.12"
    assert machine.make("setup")[1] == []
    machine.age()
    assert machine.make("setup") == (0, [TORCH, *REST], "")
    assert machine.version() == "3.12"
    assert machine.make("setup", "PYTHON=python3.11") == (0, [TORCH, *REST], "")
    assert machine.version() == "3.11"
    assert machine.make("setup", "PYTHON=python3.11") == (0, [], "")


def test_a_folder_that_setup_did_not_make_is_left_alone(machine):
    (machine.root / "mine").mkdir()
    (machine.root / "mine/file").touch()
    code, calls, line = machine.make("setup", "VENV=mine")
    assert (code, calls) == (2, [])
    assert "mine is there, but make setup did not make it" in line
    assert [path.name for path in (machine.root / "mine").iterdir()] == ["file"]
    assert machine.make("setup", "VENV=a b")[0] == 2


def test_what_only_serves_has_its_own_lock(machine):
    serving = [call.replace("cpu.txt", "serve.txt") for call in REST]
    assert machine.make("serve-only") == (0, [TORCH, *serving], "")


def test_the_other_kind_is_made_anew(machine):
    machine.make("setup")
    code, calls, _ = machine.make("setup", "GPU=1")
    assert (code, calls) == (0, [*(call.replace("cpu.txt", "gpu.txt") for call in REST[:-1]), REST[-1]])
    assert machine.make("setup") == (0, [], "")
    assert machine.make("setup", "GPU=0") == (0, [TORCH, *REST], "")


def test_clean_keeps_the_environment_and_what_runs_wrote(machine):
    machine.make("setup")
    for name in ("build/lib", "dist", "tests/__pycache__", "demo-run", "runs"):
        (machine.root / name).mkdir(parents=True)
    assert machine.make("clean")[0] == 0
    left = {path.name for path in machine.root.iterdir()}
    assert left == {"Makefile", "constraints.txt", "pyproject.toml", "supply", ".venv", "tests", "demo-run", "runs"}
    assert not (machine.root / "tests/__pycache__").exists()
