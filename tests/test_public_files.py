"""Files for the public: citation, issue forms, the workflow of continuous integration, hooks, the changelog."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema import validators

from tests.helpers.repository import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOW = ".github/workflows/tests.yml"
NIGHTLY = ".github/workflows/nightly.yml"
FILES = {
    "CITATION.cff": "citation-file-format",
    WORKFLOW: "github-workflows",
    NIGHTLY: "github-workflows",
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
    ".github/ISSUE_TEMPLATE/bug.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/architecture.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/idea.yml": "github-issue-forms",
    "deploy/compose.yaml": "compose-spec",
    "deploy/compose.gpu.yaml": "compose-spec",
}


class Loader(yaml.SafeLoader):
    """YAML as GitHub reads it: `on` is a name, and a date is text."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] not in ("bool", "timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))


def read(name: str) -> Any:
    return yaml.load((ROOT / name).read_text(), Loader)


def faults(name: str, values: Any) -> list[str]:
    """Errors in `values` by the published schema of the file `name`."""
    schema: Any = get_builtin_schema(f"vendor.{FILES[name]}")
    return [error.message for error in validators.validator_for(schema)(schema).iter_errors(values)]


@pytest.mark.parametrize("name", FILES)
def test_files_keep_their_published_schemas(name):
    assert faults(name, read(name)) == []
    values = read(name)
    values["no-such-key"] = {"a": 1}
    assert faults(name, values)


def test_every_form_is_checked():
    found = {str(path.relative_to(ROOT)) for path in (ROOT / ".github").rglob("*.yml")}
    assert found <= {*FILES}


def test_the_workflow_runs_make_s_targets_and_all_of_its_tests():
    jobs = {**read(WORKFLOW)["jobs"], **{f"nightly {name}": job for name, job in read(NIGHTLY)["jobs"].items()}}
    phony = set(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split())
    run = {target for job in jobs.values() for target in job.get("strategy", {}).get("matrix", {}).get("target", [])}
    run = {target.split()[0] for target in run}
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    run |= {word for step in steps for word in re.findall(r"\bmake ([\w-]+)", step)}
    assert run <= phony
    assert {target for target in phony if target.startswith("test")} | {"setup", "lint", "wheel", "audit"} <= run
    assert not phony & {"docs"} - run, "the documentation is built in public, too"
    paths = [word for step in steps for word in re.findall(r"\btests/\S+", step)]
    assert paths
    assert all((ROOT / path).is_file() for path in paths)


def test_the_slow_tests_run_every_night():
    """On a schedule whose day, month and weekday are any."""
    (entry,) = read(NIGHTLY)["on"]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* \*", entry["cron"])
    assert "test-slow" in read(NIGHTLY)["jobs"]["slow"]["strategy"]["matrix"]["target"]


def test_the_workflow_tests_every_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [entry.rpartition(" ")[2] for entry in project["classifiers"] if ":: Python :: 3." in entry]
    assert read(WORKFLOW)["jobs"]["test"]["strategy"]["matrix"]["python"] == pythons


def test_hooks_are_the_checks_of_make_lint():
    """The same programs with the same arguments, but that ruff format mends files instead of naming them."""
    lint = re.search(r"^lint: setup\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert lint
    lines = [line.strip().replace("$(BIN)/", ".venv/bin/") for line in lint[1].splitlines()]
    wanted = [line.replace(" --check", "").removesuffix(" .") for line in lines]
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"].replace(" --force-exclude", "") for hook in repository["hooks"]]
    assert entries == wanted
    assert all(hook["language"] == "system" for hook in repository["hooks"])


def test_codespell_finds_an_error(tmp_path):
    """With the settings of pyproject.toml, which let some words pass."""
    wrong = "the".replace("he", "eh")
    (tmp_path / "text.md").write_text(f"mor of {wrong} same\n")
    command = [Path(sys.executable).with_name("codespell"), "--toml", ROOT / "pyproject.toml", tmp_path / "text.md"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert re.findall(r"(\w+) ==>", done.stdout) == [wrong]


def releases() -> list[tuple[str, str]]:
    """(version, date) of the changelog, newest first."""
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    found = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    return [(match[1], match[2]) for match in found if match]


def test_changelog_is_short_and_in_order():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert len(releases()) == text.count("\n## ") - 1, "every release has a date"
    assert releases() == sorted(releases(), reverse=True)
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        assert len(section.splitlines()) <= 70, f"{section[:20]}: what users notice, not more"
        kinds = re.findall(r"^### (\w+)$", section, re.MULTILINE)
        order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
        assert kinds == [kind for kind in order if kind in kinds]


def test_the_citation_is_of_the_last_release():
    from loopwise.version import __version__

    citation = read("CITATION.cff")
    assert (citation["version"], citation["date-released"]) == releases()[0]
    assert __version__.removesuffix(".dev0") >= citation["version"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["license"] == project["license"]
    assert citation["keywords"] == project["keywords"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]


def test_every_test_that_security_names_exists():
    """docs/security.md promises by tests: a name without a file is a promise without one."""
    named = {*re.findall(r"\btest_\w+\.py\b", (ROOT / "docs" / "security.md").read_text())}
    assert len(named) > 15
    assert sorted(named - {path.name for path in (ROOT / "tests").rglob("test_*.py")}) == []
