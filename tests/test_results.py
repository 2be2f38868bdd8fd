"""`make results` and `make results-real` with few steps: every command, the page, and a run that is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT

PAGE = ("results.md", "images")


def results(out: Path, *more: object) -> list[str]:
    """The command that writes its page into `out`."""
    report, images = (out / name for name in PAGE)
    argv = [*map(str, more), "--tiny", "--out", str(out), "--report", str(report), "--images", str(images)]
    return [sys.executable, "-m", "bench.results", *argv]


def ended(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_all_results_are_made_and_none_twice(tmp_path):
    out = tmp_path / "results"
    gained = tmp_path / "gained"
    for what in ([], ["real"]):
        done = ended(results(out, *what))
        assert done.returncode == 0, done.stderr + done.stdout
    page = (out / "results.md").read_text()
    assert page.count("Not measured yet") == 1  # (f)
    for claim in ("beats plain, 2 layers: **", "(topk) beats fixed recursion: **", "recovers more than labels: **"):
        assert claim in page
    for picture in ("hops", "depth", "exits", "relaxed"):
        assert (out / "images" / f"results-{picture}.png").stat().st_size > 5_000
        assert f"(images/results-{picture}.png)" in page
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    _finished_run(out, gained)
    again = ended(results(out, "real", "--real", gained))
    assert again.returncode == 0, again.stderr
    assert "loopwise train" not in again.stdout
    assert "not finished" not in again.stdout
    assert written == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert "2 hops at R = 2 are 20 points above R = 1" in (out / "results.md").read_text()


def _finished_run(out: Path, folder: Path) -> None:
    """A folder as of a real model's run, from the small one's files."""
    folder.mkdir()
    run = out / "chains" / "hops-0"
    (folder / "chains.json").write_text(run.with_name("hops-0.json").read_text())
    (folder / "run.json").write_text((run / "run.json").read_text())
    for name in ("text", "source"):
        (folder / f"{name}.json").write_text((out / "relaxed" / "start-tied.json").read_text())
    (folder / "commands.sh").write_text("loopwise train a b\n")


@pytest.mark.slow
def test_a_killed_run_goes_on_with_what_it_has(tmp_path):
    """SIGKILL in the middle of a training run, whose process saves and ends; the same command then resumes it."""
    out = tmp_path / "results"
    argv = [*results(out, "--only", "c"), "--share", "0.008"]
    running = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = out / "chains" / "hops-0"
    try:
        _wait(lambda: any(run.glob("checkpoint-*")), 200)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert not (run / "config.json").is_file()
    note = out / "jobs" / "chains.hops-0.json"
    _wait(lambda: "SIGTERM" in note.with_suffix(".log").read_text(), 60)
    done = ended(argv)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "hops-0 --recipe=hops" in done.stdout
    assert "--resume" in done.stdout
    assert json.loads(note.read_text())["attempts"] == 2
    assert json.loads((run / "run.json").read_text())["spent"]["steps"] == 8


def _wait(done, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--only", "bx"], "--only bx: 'x' is none of b, c, d, e"),
        (["--seeds", "0"], "--seeds 0: at least 1"),
        (["--text", "no such text"], "no such text: no such file or directory"),
        (["report", "--real", "no such run"], "no such run: no chains.json in it; a finished run has chains.json, "),
    ],
)
def test_wrong_arguments_and_folders_are_one_line(more, message, tmp_path, capsys):
    from bench.results.__main__ import main

    assert main([*more, "--tiny", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"results: error: {message}")
    assert said.count("\n") == 1


def test_a_folder_of_another_command_is_refused(tmp_path):
    from bench.results.commands import Commands, Failed, write

    at = Commands(tmp_path)
    write(tmp_path / "jobs" / "a.b.json", {"command": ["init", "a/b"], "seconds": 3.0, "attempts": 1})
    with pytest.raises(Failed, match="of another command") as caught:
        at.run("a/b", "init", "a/b", "num_hidden_layers=3")
    assert "\n" not in str(caught.value)
    assert at.seconds("a/") == 3
    assert at.line("a/b") == "loopwise init a/b"


def test_no_command_starts_when_the_time_is_over(tmp_path):
    from bench.results.commands import Commands, Paused

    at = Commands(tmp_path, seconds=0)
    at.begun = True  # a first one always runs
    with pytest.raises(Paused, match=r"^next is loopwise init a num_hidden_layers=3$"):
        at.run("a", "init", "a", "num_hidden_layers=3")
    assert not list((tmp_path / "jobs").iterdir())


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    from bench.results.commands import Failed, alone

    with alone(tmp_path), pytest.raises(Failed, match="another run is at work in it"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


@pytest.mark.slow
def test_steps_that_cost_as_much(tmp_path):
    """The price of a run is what its record says it spent, with every arm's curriculum and router."""
    from bench.results.costs import price, spent, steps_worth
    from tests.helpers.train_tiny import run

    run(["init", "task:hops", str(tmp_path / "empty"), "num_hidden_layers=5", "hidden_size=16"])
    settings = ["--recipe=hops", "seed=0", "batch_size=4"]
    for name, keys in {
        "fixed": ["sizes=1,1,0", "injection=linear"],
        "mor": ["method=mor", "loops=3", "sharing=middle-cycle"],
    }.items():
        run(["convert", str(tmp_path / "empty"), str(tmp_path / name), *keys])
        more = (
            ["recurrence=null", "recurrence.sampler=fixed", "recurrence.capacity_warmup=0.5"] if name == "mor" else []
        )
        run(["train", str(tmp_path / name), str(tmp_path / f"{name}-run"), *settings, *more, "steps=3"])
        flops = spent(tmp_path / f"{name}-run")
        assert price(tmp_path / name, [*settings, *more], 3) == flops
        assert steps_worth(tmp_path / name, [*settings, *more], flops) == 3


def test_models_are_priced_in_threads(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from bench.results.costs import costs
    from tests.helpers.train_tiny import run

    names = [str(tmp_path / str(n)) for n in range(6)]
    for name in names:
        run(["init", "task:hops", name, "hidden_size=16"])
    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(costs, map(Path, names)))) == 1


def test_claims_are_printed_as_they_are():
    from bench.results.markdown import claim, kept, spread

    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert claim("A beats B", [2.0, 3.0], [1.0, 1.0]) == "- A beats B: **holds**, in 2 of 2 seeds, by 1.5 ± 0.7 %."
    assert "**is not decided**, in 1 of 2 seeds" in claim("A beats B", [2.0, 0.0], [1.0, 1.0])
    assert "**fails**, in 0 of 2 seeds" in claim("A beats B", [1.0, 0.0], [1.0, 1.0])
    assert "**holds**" in kept("A is B", [0.5, 1.5], [1.0, 1.0])
    assert "**fails**" in kept("A is B", [0.0, -1.0], [1.0, 1.0])
