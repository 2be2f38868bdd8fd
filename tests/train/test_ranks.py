"""Ranks that are killed or stopped, SIGTERM from start to end, and ranks that see different files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.kills import newest
from loopwise.train import watch
from loopwise.train.ranks import LAUNCHERS
from tests.helpers import ranks
from tests.helpers.ranks import await_, await_moment, start, strike
from tests.helpers.train_tiny import RECURRENCE, run, same, weights

STEPS = 24
SETTINGS = [*RECURRENCE, f"steps={STEPS}", "save_every=4", "batch_size=2", "data.eval_fraction=0.3"]
SETTINGS += ["recurrence.eval_at=" + ",".join(map(str, range(1, 25)))]  # an evaluation that a signal can hit
STRIKES = [
    pytest.param(launcher, number, marks=pytest.mark.slow)
    for launcher in LAUNCHERS
    for number in (signal.SIGKILL, signal.SIGSTOP)
]


@pytest.mark.parametrize(("launcher", "number"), STRIKES)
def test_a_lost_rank_ends_all_and_the_resumed_run_is_equal(launcher, number, noisy, command, tmp_path):
    """One rank is lost at each of four moments of one run; all processes end each time."""
    out, whole, draw = tmp_path / "out", tmp_path / "whole", random.Random(1)
    for moment in ranks.MOMENTS:
        resume = ["--resume"] if (out / "train_recipe.yaml").is_file() else []
        launched = start([*command(noisy, out, *SETTINGS), *resume], launcher)
        await_moment(launched, out, moment, STEPS, draw)
        seconds = strike(launched, out, number, draw)
        print(f"{launcher}: {number.name} at {moment}: all ended after {seconds:.1f} s")
        assert not (out / "config.json").exists()
    assert start([*command(noisy, out, *SETTINGS), "--resume"], launcher).wait(300) == 0
    assert start(command(noisy, whole, *SETTINGS), launcher).wait(300) == 0
    if launcher.startswith("zero"):
        found, expected = weights(out), weights(whole)
        assert all(torch.allclose(found[name], x, atol=1e-4) for name, x in expected.items())
    else:
        assert same(out, whole)


def test_a_killed_rank_ends_the_run(noisy, command, tmp_path):
    out = tmp_path / "out"
    launched = start(command(noisy, out, *SETTINGS), "ddp")
    await_moment(launched, out, "training", STEPS, random.Random(1))
    assert strike(launched, out, signal.SIGKILL, random.Random(1)) < 40
    assert newest(out)


@pytest.mark.slow
def test_the_ranks_of_a_killed_launcher_end(noisy, command, tmp_path):
    out = tmp_path / "out"
    launched = start(command(noisy, out, *SETTINGS, "steps=100000"), "ddp")
    await_moment(launched, out, "training", STEPS, random.Random(1))
    launched.kill()
    launched.wait()
    deadline = time.monotonic() + 10
    while ranks.processes_of(out):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "running"])
def test_the_watcher_kills_a_stopped_process_alone(stopped, tmp_path):
    """The rank is a plain process that starts the watcher as a worker does, with a limit of one second."""
    file = tmp_path / "watch.py"
    file.write_text(Path(watch.__file__).read_text().replace("STOPPED = 15", "STOPPED = 1"))
    code = "import watch, time; watch.watched(); print('ready', flush=True); time.sleep(30)"
    rank = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert rank.stdout is not None
        rank.stdout.readline()
        if stopped:
            rank.send_signal(signal.SIGSTOP)
            assert rank.wait(15) == -signal.SIGKILL
            assert rank.stderr is not None
            assert b"is ended: it was stopped for 1 s" in rank.stderr.read()
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                rank.wait(4)
    finally:
        rank.kill()
        rank.wait()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [None, "ddp"])
def test_sigterm_in_the_last_evaluation_keeps_the_run(launcher, noisy, command, tmp_path):
    """Without `save_every` nothing else would be left of it."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    settings = [*RECURRENCE, "steps=6", "log_every=1", "data.eval_fraction=0.4"]
    settings += ["batch_size=2"]
    long = "recurrence.eval_at=" + ",".join(map(str, range(1, 33)))
    more = ["--launcher", launcher, "--processes", "2"] if launcher else ["gradient_accumulation=2"]
    argv = [sys.executable, "-u", "-m", "loopwise", *command(noisy, out, *settings), *more]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*argv, long], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        await_(process, lambda: "step 6/6" in (tmp_path / "log").read_text())
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert "checkpoint-6 is written, --resume continues from it" in (tmp_path / "log").read_text()
    assert not (out / "config.json").exists()
    assert subprocess.run([*argv, "--resume"], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode == 0
    run(command(noisy, whole, *settings, "gradient_accumulation=2"))
    assert same(out, whole)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_loss_r1" in record for record in history) == 1


@pytest.mark.parametrize("more", [[], pytest.param(["--launcher", "ddp", "--processes", "2"], marks=pytest.mark.slow)])
def test_sigterm_while_tokenising_leaves_nothing(more, noisy, command, tmp_path):
    big = tmp_path / "big.txt"
    big.write_text("the core runs again while depth grows\n" * 300_000)
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "loopwise", *command(noisy, out, "steps=6", f"data.train={big}")]
    process = subprocess.Popen([*argv, *more])
    try:
        await_(process, lambda: list(tmp_path.glob(".out.partial-*")))
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.txt"]


USER = """
import sys, time
import loopwise.train.{place}
{change}
from loopwise.cli import main
sys.exit(main())
"""


def users_launcher(tmp_path: Path, change: str, arguments: list[str], place: str) -> subprocess.CompletedProcess:
    """`torchrun` of two ranks that make `change` to themselves before they run `loopwise ARGUMENTS`."""
    script = tmp_path / "script.py"
    script.write_text(USER.format(change=change, place=place))
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*argv, *arguments], capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.slow
def test_tokenising_may_outlast_the_timeout_of_collectives(noisy, command, tmp_path):
    """The group's timeout is 15 s here, and the first rank takes 25 s to prepare."""
    change = """
import datetime, os
import torch.distributed as distributed
import loopwise.train.worker as worker
begin, prepare = distributed.init_process_group, worker.prepare
def short(*arguments, **keys):
    begin(*arguments, **{**keys, "timeout": datetime.timedelta(seconds=15)})
def slow(run):
    time.sleep(25)
    return prepare(run)
distributed.init_process_group, worker.prepare = short, slow
"""
    done = users_launcher(tmp_path, change, command(noisy, tmp_path / "out", "steps=2", *RECURRENCE), "worker")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()


def test_any_error_of_the_first_rank_ends_the_others(noisy, command, tmp_path):
    change = """
import loopwise.train.worker as worker
def broken(run):
    raise ZeroDivisionError("in the first rank")
worker.prepare = broken
"""
    began = time.monotonic()
    done = users_launcher(tmp_path, change, command(noisy, tmp_path / "out", "steps=2", *RECURRENCE), "worker")
    assert done.returncode != 0
    assert "in the first rank" in done.stderr
    assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "what"), [("checkpoint-10/run.json", "checkpoint-10"), ("tokens/facts.json", "the tokens")]
)
def test_ranks_that_see_different_files_are_refused(place, what, noisy, command, tmp_path):
    """Rank 1 sees another OUT, as on a machine that does not share the file system."""
    out, other = tmp_path / "out", tmp_path / "other"
    settings = [*RECURRENCE, "steps=20", "save_every=10", "batch_size=2"]
    run(command(noisy, out, *settings, "gradient_accumulation=2"))
    for path in (out / "config.json", out / "model.safetensors", out / "checkpoint-20" / "run.json"):
        path.unlink()
    change = f"""
import os
from pathlib import Path
import loopwise.train.agree as agree
agree.WAIT = 1
seen = agree._seen
if os.environ["RANK"] == "1":
    other = Path({str(other)!r})
    agree._seen = lambda out, checkpoint: seen(other, checkpoint and other / checkpoint.name)
if os.environ["RANK"] == "0":
    import shutil
    chosen = agree.chosen
    def with_other(out, resume):
        shutil.copytree(out, {str(other)!r})
        file = Path({str(other)!r}) / {place!r}
        file.write_text(file.read_text().replace("0", "1"))
        return chosen(out, resume)
    import loopwise.train.run as running
    running.chosen = with_other
"""
    done = users_launcher(tmp_path, change, [*command(noisy, out, *settings), "--resume"], "agree")
    assert done.returncode != 0
    assert f"does not see {what} of {out} as rank 0 does" in done.stderr
    assert newest(out) == 20
