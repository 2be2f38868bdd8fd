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


RETROFIT = ["sizes=1,1,0", "injection=linear"]
SUPERVISED = ["objectives.deep_supervision.segments=2", "recurrence.backprop=null", "gradient_accumulation=2"]


@pytest.mark.parametrize(
    ("keys", "more"),
    [
        pytest.param(RETROFIT, [], id="fixed", marks=pytest.mark.slow),
        pytest.param(RETROFIT, ["optimiser.train=core,injection", "optimiser.multipliers=null"], id="frozen"),
        pytest.param(RETROFIT, SUPERVISED, id="supervised", marks=pytest.mark.slow),
        pytest.param(
            ["method=mor", "loops=3", "sharing=middle-cycle"],
            ["recurrence=null", "recurrence.sampler=fixed", "recurrence.capacity_warmup=0.5"],
            id="mor",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_steps_that_cost_as_much(keys, more, tmp_path):
    """The price of a run is what its record says it spent, with every arm's curriculum and router."""
    from bench.results.costs import price, spent, steps_worth
    from tests.helpers.train_tiny import run

    empty, model, out = (tmp_path / name for name in ("empty", "model", "run"))
    run(["init", "task:hops", str(empty), "num_hidden_layers=5", "hidden_size=16"])
    settings = ["--recipe=hops", "seed=0", "batch_size=4", *more]
    run(["convert", str(empty), str(model), *keys])
    run(["train", str(model), str(out), *settings, "steps=3"])
    assert price(model, settings, 3) == spent(out)
    assert steps_worth(model, settings, spent(out)) == 3


def test_losses_recovered_are_printed(tmp_path, monkeypatch):
    """Section (a) of files made by hand: each arm recovers its share of 1 nat, for FLOPs with the teacher's."""
    from bench.results import relaxed
    from bench.results.chains import TINY
    from bench.results.commands import Commands, write
    from loopwise.train.measure import Cost, Costs

    at, folder = Commands(tmp_path), tmp_path / "relaxed"
    folder.mkdir()
    loss = lambda value: {"results": [{"loss": value}]}  # noqa: E731
    for made, value in {"source": 2.0, "random": 4.0, "few-source": 2.0, **dict.fromkeys(relaxed.RANKS, 2.5)}.items():
        write(folder / (f"{made}.json" if made == "few-source" else f"start-{made}.json"), loss(value))
    write(folder / "start-tied.json", loss(3.0))
    for n, (kind, way) in enumerate(relaxed.ARMS):
        run = folder / f"{kind}-{way}"
        run.mkdir()
        write(run / "run.json", {"spent": {"flops": 1e15}})
        write(run / "trainer_state.json", {"max_steps": 4, "log_history": [{"step": 4, "eval_loss_r2": 2.5}]})
        write(folder / f"{kind}-{way}.json", loss(2.9 - n / 10))
    for made in ("teacher", "lora-low", "lora-low-distilled", "lora-low-distilled.json"):
        write(tmp_path / "jobs" / f"relaxed.{made}.json", {"command": ["convert"], "seconds": 6.0, "attempts": 1})
    forward = 1e15 / 2 / (TINY.steps(relaxed.STEPS) * relaxed.BATCH * relaxed.LENGTH)
    part = Cost(forward / 4, 0.0)
    monkeypatch.setattr(relaxed, "costs", lambda model: Costs(part, part, Cost(forward / 2, 0.0)))
    page = "\n".join(relaxed.lines(at, TINY, Path("SmolLM2"), tmp_path, "images"))
    assert "| tied | 3.0000 | 2.9000 | 10 % | 1.00e+15 | 0.10 |" in page
    assert "| tied, distilled | 3.0000 | 2.8000 | 20 % | 2.00e+15 | 0.10 |" in page
    assert (tmp_path / "results-relaxed.png").stat().st_size > 5_000


def test_errors_of_seeds_and_problems(tmp_path):
    """Three models are right in 40, 50 and 60 of the same 100 problems."""
    from bench.results.chains import pooled

    def result(share: float) -> dict:
        cell = {"accuracy": share, "answers": 100}
        return {"results": [{"num_recurrences": 1, "groups": {"2": cell}}]}

    file = pooled([result(share) for share in (0.4, 0.5, 0.6)], "three", tmp_path / "pooled.json")
    (row,) = json.loads(file.read_text())["results"]
    assert row["groups"]["2"]["answers"] == 100
    assert row["groups"]["2"]["accuracy_error"] == pytest.approx((0.25 / 100 + 0.01 / 3) ** 0.5)


def test_another_text_and_another_source_are_refused(tmp_path):
    from bench.results import text
    from bench.results.commands import Commands, Failed

    learned = [tmp_path / name for name in ("a.txt", "b.txt")]
    for file in learned:
        file.write_text("some text\n\n" * 200)
    text.prepare(tmp_path / "text", learned[0], 1000)
    text.prepare(tmp_path / "text", learned[0], 1000)
    with pytest.raises(Failed, match=r"has a text of text=.*a.txt, and now it is .*b.txt; choose another OUT"):
        text.prepare(tmp_path / "text", learned[1], 1000)
    at, (one, other) = Commands(tmp_path / "out"), (tmp_path / name / "model" for name in "ab")
    for model in (one, other):
        model.mkdir(parents=True)
    assert at.linked(one) == at.linked(one) == "model"
    with pytest.raises(Failed, match=r"choose another OUT"):
        at.linked(other)


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
