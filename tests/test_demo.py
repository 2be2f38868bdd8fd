"""The demo's own part: a directory that it may replace, steps that say why they fail, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loopwise.cli import guarded
from loopwise.demo import chains, pretrained, processes, serving
from loopwise.demo.__main__ import FILES, MODELS, OURS, check_out, main, prepare
from loopwise.errors import UserError

# A step that starts a process of its own, tells both ids, and heeds no SIGINT.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
RUNNER = """
import signal, sys
from loopwise.cli import guarded
from loopwise.demo import chains, processes
from loopwise.demo.__main__ import stop_by_signals
processes.STEP_SECONDS = 0.5
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # whatever this test's own start ignores, as nohup does
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
stop_by_signals()
sys.exit(guarded(lambda _: processes.step("stubborn", [sys.executable, "-c", sys.argv[1]]), []))
"""


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_stopped_leaves_no_process(number):
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER, STUBBORN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout
        assert demo.stdout.readline() == "\n"
        assert demo.stdout.readline() == "$ stubborn\n"
        started = [int(pid) for pid in demo.stdout.readline().split()]
        assert len(started) == 2
        assert all(map(_alive, started))
        os.kill(demo.pid, number)
        _, told = demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert told == "loopwise: interrupted\n"
    end = time.monotonic() + 10
    while any(map(_alive, started)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(_alive, started))


def test_a_step_that_fails_ends_the_demo(capfd):
    with pytest.raises(processes.StepFailed, match="the step above ended with exit code 2"):
        processes.loopwise("conjure", "a model")
    shown = capfd.readouterr()
    assert shown.out == "\n$ loopwise conjure 'a model'\n"
    assert shown.err.startswith("loopwise: error: unknown verb 'conjure': ")


def test_a_directory_that_is_no_demo_s_stays(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert guarded(main, ["--out", str(tmp_path / "mine")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("standing", "options", "message"),
    [
        ("run/thesis.tex", [], "holds thesis.tex, which no demo left"),
        ("run/my-model/loopwise.json", [], "holds my-model, which no demo left"),
        ("run/converted/thesis.tex", [], "holds converted, which no demo left"),
        ("run/text/thesis.txt", ["--text", "run/text/thesis.txt"], "thesis.txt lies in run, which the demo replaces"),
        ("run/retrained/loopwise.json", ["--text", "run/retrained"], "run/retrained lies in run"),
        ("run/retrained/loopwise.json", ["--text", "link"], "link lies in run"),
    ],
)
def test_what_no_demo_left_and_what_it_reads_stay(standing, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / standing
    file.parent.mkdir(parents=True)
    file.write_text('{"loopwise": "0.1.0"}')
    (tmp_path / "run" / OURS).touch()
    (tmp_path / "link").symlink_to("run/retrained")
    assert guarded(main, ["--out", "run", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert file.exists()


@pytest.mark.parametrize("name", ["eval.json", "checkpoint-3/notes.txt", "tokens/notes.txt"])
def test_a_file_of_the_user_inside_of_a_model_stays(name, tmp_path):
    """As a result of `loopwise eval --out`, beside the model that it measured."""
    model = tmp_path / "run" / "chains-trained"
    model.mkdir(parents=True)
    (tmp_path / "run" / OURS).touch()
    (model / "model.safetensors").touch()
    (model / "train_recipe.yaml").write_text("# loopwise 0: loopwise train model out\n")
    files = ["model.safetensors"]
    (model / "loopwise.json").write_text(json.dumps({"loopwise": "0.1.0", "files": files}))
    check_out(tmp_path / "run")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds chains-trained/{name}, which no demo left"):
        prepare(check_out(tmp_path / "run"))
    assert (model / name).read_text() == "mine"
    assert (model / "model.safetensors").is_file()


def test_a_demo_that_runs_keeps_its_directory(tmp_path, monkeypatch, capsys):
    script = "import sys; from loopwise.cli import guarded; from loopwise.demo import __main__ as it"
    script += "; it.demo = lambda *_: None; sys.exit(guarded(it.main, sys.argv[1:]))"

    def second(*_: object) -> None:
        command = [sys.executable, "-c", script, "--out", str(tmp_path / "run")]
        other = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert other.returncode == 2
        assert "another run of Loopwise writes it" in other.stderr
        raise processes.StepFailed("enough")

    monkeypatch.setattr(pretrained, "check", lambda *_: None)
    monkeypatch.setattr(pretrained, "part", second)
    assert guarded(main, ["--out", str(tmp_path / "run")]) == 2
    assert "enough" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_earlier_demo_is_replaced_and_a_link_to_it_kept(tmp_path):
    killed = (".chains.json.partial-7", ".retrained.old-7/loopwise.json", "chains-base/.checkpoint-1.partial/x")
    (tmp_path / "run" / "chains-base").mkdir(parents=True)
    (tmp_path / "run" / "chains-base" / "train_recipe.yaml").write_text("# loopwise 0: loopwise train model out\n")
    for name in (OURS, ".DS_Store", "chains.json", "converted/loopwise.json", "converted/model.safetensors", *killed):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text('{"loopwise": "0.1.0"}')
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "empty").mkdir()
    for name in ("link", "empty", "new/below"):
        prepare(check_out(tmp_path / name))
        assert [path.name for path in (tmp_path / name).iterdir()] == [OURS]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
def test_a_place_where_no_demo_can_write_is_one_line(name, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert guarded(main, ["--out", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_the_demo_writes_is_what_it_may_replace(tmp_path, monkeypatch):
    """Every name below its folder, in the commands that it runs."""
    ran: list[str] = []
    monkeypatch.setattr(chains, "loopwise", lambda *words: ran.extend(map(str, words)))
    monkeypatch.setattr(pretrained, "loopwise", lambda *words: ran.extend(map(str, words)))
    monkeypatch.setattr(pretrained, "sizes", lambda source: (1, 1, 1))
    monkeypatch.setattr(
        pretrained, "measure", lambda model, data, result, *_: ran.append(str(result)) or {"results": []}
    )
    pretrained.part(tmp_path, "model", "text")
    chains.part(tmp_path)
    written = {str(Path(word).relative_to(tmp_path)) for word in ran if word.startswith(str(tmp_path))}
    source = Path(serving.__file__).read_text()
    written |= set(re.findall(r'out / "([^"]+)"', source))
    assert written == (MODELS | FILES) - {OURS}


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / OURS).touch()
    (tmp_path / "run" / "chains.json").touch()
    assert guarded(main, ["--out", str(tmp_path / "run"), "--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"loopwise: error: {tmp_path / 'none'}: no such directory\n"
    assert (tmp_path / "run" / "chains.json").exists()  # a demo that cannot start replaces none


def test_the_plain_model_s_figure_is_the_recorded_one(tmp_path):
    file = tmp_path / "results.md"
    assert chains.recorded(file) is None
    file.write_text("## (a)\n\n| plain | 1.0 |\n\n## (c) Chains of assignments\n\n| hops | 0 | all |\n|---|---|---|\n")
    assert chains.recorded(file) is None
    with file.open("a") as more:
        more.write(
            "| the base | 94.5 | 19.4 |\n| plain, about 4191 steps more | 100.0 ± 0.1 | 52.3 ± 0.4 |\n\n## (d)\n"
        )
    assert chains.recorded(file) == 52.3
