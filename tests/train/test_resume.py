"""Killed and resumed runs, and several processes, reach bit-identical weights."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch

from loopwise.cli import main
from loopwise.evaluation.plot.run import sampled_recurrences
from loopwise.recipe import RECIPES, load_recipe
from loopwise.train.data.blocks import FACTS
from loopwise.train.output import TOKENS
from loopwise.train.prepare import prepare
from loopwise.train.recipe import Train
from loopwise.train.settings import Run
from tests.helpers.train_tiny import RECURRENCE, history, run, same


def environment() -> dict[str, str]:
    """This process's environment and number of threads, on which the rounding of sums depends."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "loopwise", *arguments], env=environment())


def kill_after(checkpoint: Path, process: subprocess.Popen) -> None:
    """SIGKILL `process` once `checkpoint` exists."""
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (checkpoint.parent / "model.safetensors").exists()


@pytest.mark.slow
def test_killed_and_resumed_run_ends_the_same(noisy, command, tmp_path, capsys):
    settings = ["steps=90", "save_every=30", *RECURRENCE, "gradient_accumulation=2", "data.eval_fraction=0.1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_after(killed / "checkpoint-30", start(command(noisy, killed, *settings)))
    (killed / ".checkpoint-60.partial" / "checkpoint-60").mkdir(parents=True, exist_ok=True)  # killed while writing
    run(command(noisy, killed, *settings, "--resume"))
    assert "from checkpoint-" in capsys.readouterr().out
    run(command(noisy, whole, *settings))
    assert same(killed, whole)
    for name in ("optimizer.pt", "scheduler.pt"):
        a, b = (torch.load(path / "checkpoint-90" / name, weights_only=True) for path in (killed, whole))
        assert json.dumps(a, default=tolist) == json.dumps(b, default=tolist)
    assert not list(killed.glob(".*"))
    run(command(noisy, killed, *settings, "--resume"))
    assert "already finished" in capsys.readouterr().out


def test_a_run_with_recurrences_by_phase_resumes_to_the_bit(noisy, corpus, command, tmp_path):
    phases = [
        {"share": 0.4, "sources": {str(corpus): 1}, "recurrence": {"mean": 1}},
        {"share": 0.6, "sources": {str(corpus): 1}, "recurrence": {"mean": 4, "sampler": "uniform", "min": 2}},
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"data": {"phases": phases, "sequence_length": 32}, "batch_size": 4, "steps": 10}))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = ["--recipe", str(recipe), "log_every=1", "save_every=5"]
    run(["train", str(noisy), str(whole), *settings])
    assert history(whole, "num_recurrences")[:4] == [1, 1, 1, 1]
    assert {*history(whole, "num_recurrences")[4:]} <= {2, 3, 4, 5, 6}
    assert json.loads((whole / "config.json").read_text())["trained_recurrences"] == {"mean": 4, "min": 1, "max": 6}
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-10")
    (cut / "config.json").unlink()
    run(["train", str(noisy), str(cut), *settings, "--resume"])
    assert same(whole, cut)
    assert history(cut, "num_recurrences") == history(whole, "num_recurrences")
    kept = json.loads((cut / "run.json").read_text())["run"]
    state = json.loads((cut / "trainer_state.json").read_text())
    assert sampled_recurrences(kept, state) == history(whole, "num_recurrences")


def tolist(tensor: torch.Tensor) -> list:
    return tensor.tolist()


@pytest.fixture(scope="module")
def stopped(noisy, command, tmp_path_factory) -> Path:
    """A run of 20 steps with checkpoints at 10 and 20, as if it had been killed at its end."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    run(command(noisy, out, "steps=20", "save_every=10", *RECURRENCE))
    for path in (out / "config.json", out / "model.safetensors", out / "trainer_state.json"):
        path.unlink()
    return out


def test_resume_refuses_another_run(stopped, noisy, recurrent, corpus, command, tmp_path, capsys):
    out = shutil.copytree(stopped, tmp_path / "out")

    def refused(*settings: str, model: Path = noisy) -> str:
        assert main(command(model, out, "steps=20", "save_every=10", *RECURRENCE, *settings, "--resume")) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        return error

    error = refused("recurrence.mean=4", "optimiser.learning_rate=1e-3", "log_every=3")
    assert "optimiser.learning_rate was 0.003, now 0.001; recurrence.mean was 3, now 4" in error
    assert "log_every" not in error
    assert "gradient_accumulation x processes was 1, now 2" in refused("gradient_accumulation=2")
    assert f"MODEL was '{noisy}', now '{recurrent}'" in refused(model=recurrent)
    (tmp_path / "more.jsonl").write_text(corpus.read_text() + '{"text": "and one document more"}\n')
    assert "data.train was" in refused(f"data.train={tmp_path / 'more.jsonl'}")
    corpus.rename(tmp_path / "aside")
    try:
        shutil.copy(tmp_path / "more.jsonl", corpus)
        assert "digest of the data was" in refused()
    finally:
        (tmp_path / "aside").replace(corpus)


def test_resume_of_a_run_from_before_a_key_was_added(stopped, noisy, command, tmp_path, capsys):
    """The added key counts as its default; a section that was left out then is no section of defaults."""
    out = shutil.copytree(stopped, tmp_path / "out")
    shutil.rmtree(out / "checkpoint-20")
    file = out / "checkpoint-10" / "run.json"
    record = json.loads(file.read_text())
    del record["run"]["recipe"]["optimiser"]["clip"], record["run"]["recipe"]["seed"]
    file.write_text(json.dumps(record))
    arguments = command(noisy, out, "steps=20", "save_every=10", *RECURRENCE, "--resume")
    for setting, named in {
        "optimiser.clip=0.5": "(optimiser.clip was 1.0, now 0.5)",
        "seed=1": "(seed was 0, now 1)",
        "objectives.exits={}": "objectives.exits.weights was None, now 'constant'",
    }.items():
        assert main([*arguments, setting]) == 2
        assert named in capsys.readouterr().err
    run(arguments)
    assert "from checkpoint-10" in capsys.readouterr().out


def test_a_hub_model_that_moves_stays_as_it_was_when_the_run_began(noisy, command, tmp_path, monkeypatch):
    """Branches are resolved once: OUT keeps the commits of the model and of the teacher."""
    from huggingface_hub import constants

    from loopwise.train import run as training

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, out = tmp_path / "hub" / "models--tiny--model", tmp_path / "out"
    first, second = "1" * 40, "2" * 40
    shutil.copytree(noisy, repository / "snapshots" / first)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(first)
    settings = [*RECURRENCE, "steps=4", "save_every=2", "objectives.distillation.teacher=tiny/model"]
    arguments = command(Path("tiny/model"), out, *settings)

    def killed(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_finish", killed)
        assert main(arguments) == 130
    shutil.rmtree(out / "checkpoint-4")
    moved = shutil.copytree(noisy, repository / "snapshots" / second)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    (moved / "model.safetensors").unlink()  # which the teacher would need
    (repository / "refs" / "main").write_text(second)
    run([*arguments, "--resume"])
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    record = json.loads((out / "loopwise.json").read_text())
    assert record["source"] == {"id": "tiny/model", "revision": first}
    assert record["recipe"]["objectives"]["distillation"]["revision"] == first


def test_damaged_checkpoints_are_left_out(stopped, noisy, command, tmp_path, capsys):
    settings = ["steps=20", "save_every=10", *RECURRENCE, "--resume", "log_every=5"]
    ends = []
    for name, spoil in {
        "whole": lambda newest: None,
        "cut": lambda newest: os.truncate(newest / "optimizer.pt", 100),
        "missing": lambda newest: (newest / "model.safetensors").unlink(),
        "spoilt": lambda newest: spoil_byte(newest / "model.safetensors"),
        "unnamed": lambda newest: (newest / "run.json").unlink(),
    }.items():
        out = shutil.copytree(stopped, tmp_path / name)
        spoil(out / "checkpoint-20")
        run(command(noisy, out, *settings))
        shown = capsys.readouterr()
        if name != "whole":
            assert "checkpoint-20 is left out: " in shown.err
            assert "from checkpoint-10" in shown.out
        ends.append(out)
    assert all(same(ends[0], end) for end in ends[1:])


def spoil_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_settings_may_change_when_told_so(stopped, noisy, command, tmp_path, capsys):
    out = shutil.copytree(stopped, tmp_path / "out")
    shutil.rmtree(out / "checkpoint-20")
    arguments = command(noisy, out, "steps=20", "save_every=10", *RECURRENCE, "optimiser.weight_decay=0.5")
    run([*arguments, "--resume", "--accept-changes"])
    assert "continuing with other settings (optimiser.weight_decay was 0.01, now 0.5)" in capsys.readouterr().err
    assert main([*arguments, "--accept-changes"]) == 2


def test_a_text_that_may_change_is_tokenised_anew(stopped, noisy, command, tmp_path, capsys):
    """With other settings, and with another source: the run goes on with the blocks that the settings ask for."""
    out = shutil.copytree(stopped, tmp_path / "out")
    shutil.rmtree(out / "checkpoint-20")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"another text, {name} " * 400)
    settings = command(noisy, out, "steps=20", "save_every=10", *RECURRENCE)[3:]
    others = [one for one in settings if not one.startswith("data.train=")] + ["data.sequence_length=16"]
    others.append(f"data.phases=[{{share: 1, sources: {{{tmp_path}/a.txt: 1, {tmp_path}/b.txt: 1}}}}]")

    def blocks_of(settings: list[str]) -> list[int]:
        recipe = load_recipe(Train, "train", None, settings)
        assert prepare(Run(str(noisy), out, recipe, resume=True, accept_changes=True))
        return json.loads((out / TOKENS / FACTS).read_text())["parts"]

    before = blocks_of(settings)
    found = blocks_of(others)
    assert "data.sequence_length was 32, now 16" in capsys.readouterr().err
    assert (len(before), len(found)) == (1, 2)
    (tmp_path / "a.txt").write_text("")  # of the same settings, which are not read again
    assert blocks_of([*others, "optimiser.weight_decay=0.5"]) == found
    assert blocks_of(settings) == before


def kill_at_random(arguments: list[str], out: Path, kills: int, seed: int) -> int:
    """Start, kill after a random time, resume. Returns how many kills hit a run. The last start runs to its end."""
    random = Random(seed)
    hit = 0
    for _ in range(kills):
        process = start([*arguments, *(["--resume"] if (out / "train_recipe.yaml").exists() else [])])
        try:
            began = len(list(out.glob("checkpoint-*")))
            deadline = time.monotonic() + 120
            # Anywhere between two checkpoints or within one: they are written all the time.
            while len(list(out.glob("checkpoint-*"))) <= min(began, 1) and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(random.uniform(0, 1.5))
        finally:
            hit += process.poll() is None
            process.kill()
            process.wait()
        if (out / "config.json").exists():
            break
    run([*arguments, "--resume"])
    return hit


def test_kills_at_random_change_no_bit(noisy, command, tmp_path):
    settings = ["steps=60", "save_every=1", "keep_checkpoints=2", *RECURRENCE]
    assert kill_at_random(command(noisy, tmp_path / "killed", *settings), tmp_path / "killed", 2, seed=1) >= 1
    run(command(noisy, tmp_path / "whole", *settings))
    assert same(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*"))


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([], id="alone"),
        pytest.param(["--launcher", "ddp", "--processes", "2"], id="ddp", marks=pytest.mark.slow),
    ],
)
def test_sigterm_saves_and_exits_0(launcher, noisy, command, tmp_path):
    settings = [*RECURRENCE, "steps=400", "save_every=5", "keep_checkpoints=100"]
    settings += ["batch_size=2"] if launcher else []
    process = start([*command(noisy, tmp_path / "out", *settings), *launcher])
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "checkpoint-5").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
    out = tmp_path / "out"
    assert not (out / "config.json").exists()
    newest = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    assert 5 <= newest < 400
    # A stopped run leaves the same files as a run that saves at that step.
    if not launcher:
        more = [*RECURRENCE, "steps=400", f"save_every={newest}"]
        other = start(command(noisy, tmp_path / "other", *more))
        kill_after(tmp_path / "other" / f"checkpoint-{newest}", other)
        assert same(out / f"checkpoint-{newest}", tmp_path / "other" / f"checkpoint-{newest}")


def test_a_full_disk_leaves_the_last_checkpoint(noisy, command, tmp_path, capsys, monkeypatch):
    from loopwise.train import saving

    whole = saving.write_model
    calls = []

    def full(model, tokenizer, directory, state, dtype="float32"):
        calls.append(directory)
        if len(calls) > 1:
            (directory / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        whole(model, tokenizer, directory, state, dtype)

    monkeypatch.setattr(saving, "write_model", full)
    out = tmp_path / "out"
    settings = ["steps=12", "save_every=5", *RECURRENCE]
    assert main(command(noisy, out, *settings)) == 2
    error = capsys.readouterr().err
    assert f"checkpoint-10 cannot be written to {out} (No space left on device; " in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-5"]
    assert not list(out.glob(".*"))
    monkeypatch.undo()
    run(command(noisy, out, *settings, "--resume"))
    assert "from checkpoint-5" in capsys.readouterr().out


def test_a_file_that_may_not_grow(noisy, command, tmp_path):
    """The system refuses to write the optimiser state (larger than the weights), as on a full disk."""
    limit = (noisy / "model.safetensors").stat().st_size + 20000
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "from loopwise.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = command(noisy, tmp_path / "out", "steps=4", "save_every=2", "data.sequence_length=8", *RECURRENCE)
    small = [a for a in arguments if not a.startswith("data.sequence_length=32")]
    done = subprocess.run([sys.executable, "-c", code, *small], capture_output=True, text=True, env=environment())
    assert done.returncode == 2, done.stderr
    assert "checkpoint-2 cannot be written to" in done.stderr
    assert not (tmp_path / "out").exists()  # nothing worth keeping had been written


def test_resume_without_a_checkpoint_begins(noisy, command, tmp_path, capsys):
    out = tmp_path / "out"
    run(command(noisy, out, "steps=3", *RECURRENCE, "--resume"))
    assert "from the beginning" in capsys.readouterr().out


def test_only_the_newest_checkpoints_are_kept(noisy, command, tmp_path):
    run(command(noisy, tmp_path / "out", "steps=9", "save_every=2", "keep_checkpoints=3", *RECURRENCE))
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (6, 8, 9)
    }


@pytest.mark.slow
def test_two_processes_equal_one(noisy, command, tmp_path):
    """40 steps: losses within 1e-5 at the same global batch, weights bit-equal to one accumulating process."""
    settings = ["steps=40", "log_every=1", *RECURRENCE, "data.eval_fraction=0.1", "eval_every=20"]
    two = start(command(noisy, tmp_path / "two", *settings, "--launcher", "ddp", "--processes", "2"))
    assert two.wait(300) == 0
    run(command(noisy, tmp_path / "one", *settings, "gradient_accumulation=2"))
    assert same(tmp_path / "one", tmp_path / "two")
    assert len(history(tmp_path / "two")) == 40
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), abs=1e-5)
    for key in ("eval_loss_r1", "eval_loss_r3"):
        assert history(tmp_path / "two", key) == pytest.approx(history(tmp_path / "one", key), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_launcher_of_the_user(noisy, command, tmp_path, launcher):
    settings = ["steps=4", "batch_size=2", *RECURRENCE]
    run(command(noisy, tmp_path / "one", "steps=4", "batch_size=2", "gradient_accumulation=2", *RECURRENCE))
    module = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
        "accelerate": ["accelerate.commands.launch", "--config_file", str(RECIPES / "accelerate" / "ddp.yaml")],
    }[launcher]
    # (`accelerate launch --cpu --num_processes 2` starts one process.)
    port = ["--master-port" if launcher == "torchrun" else "--main_process_port", str(free_port())]
    port += [] if launcher == "torchrun" else ["--num_processes", "2"]

    def launch(*more: str) -> subprocess.CompletedProcess:
        argv = [sys.executable, "-m", *module, *port, "-m", "loopwise", *command(noisy, tmp_path / "two", *settings)]
        return subprocess.run([*argv, *more], capture_output=True, text=True, timeout=200, env=environment())

    bad = launch("data.train=nowhere.txt")
    assert bad.returncode != 0
    assert bad.stderr.count("loopwise: error: nowhere.txt: no such file") == 1
    assert not (tmp_path / "two").exists()
    done = launch()
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "one", tmp_path / "two")
    again = launch("--resume")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("the run is already finished") == 1


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_finished_run_is_not_resumed_with_other_settings(recurrent, command, tmp_path, capsys):
    run(command(recurrent, tmp_path / "out", "steps=2"))
    run(command(recurrent, tmp_path / "out", "steps=2", "--resume"))
    assert "already finished" in capsys.readouterr().out
    assert main(command(recurrent, tmp_path / "out", "steps=4", "--resume")) == 2
    assert "steps was 2, now 4" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_processes_end_and_one_process_resumes(noisy, command, tmp_path):
    """After the launcher is killed its workers end, and one process that accumulates twice continues identically."""
    settings = ["steps=60", "save_every=15", *RECURRENCE]
    killed = tmp_path / "killed"
    kill_after(
        killed / "checkpoint-30", start(command(noisy, killed, *settings, "--launcher", "ddp", "--processes", "2"))
    )
    deadline = time.monotonic() + 30
    while any(str(killed) in line for line in command_lines()):
        assert time.monotonic() < deadline, "workers outlive their launcher"
        time.sleep(0.1)
    for out, options in ((killed, ["--resume"]), (tmp_path / "whole", [])):
        run(command(noisy, out, *settings, "gradient_accumulation=2", *options))
    assert same(killed, tmp_path / "whole")


def command_lines() -> list[str]:
    """Command lines of all processes of this machine."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_text(errors="replace").replace("\0", " "))
    return lines


def test_two_processes_report_bad_input_once(noisy, command, tmp_path, capsys):
    assert (
        main(command(noisy, tmp_path / "out", "--launcher", "ddp", "--processes", "2", "data.train=nowhere.txt")) == 2
    )
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
