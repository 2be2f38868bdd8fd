"""Two runs in one place, and what is deleted beside them: nothing that Loopwise did not write."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from loopwise import lock
from loopwise.cli import main
from loopwise.directory import RECORD, check_replaceable, claimed, finish, is_ours, new_directory
from loopwise.errors import UserError
from loopwise.lock import has_ended, lock_file, locked, marker
from loopwise.train.ranks import LAUNCHERS
from tests.helpers.repository import ROOT
from tests.helpers.serve_tiny import tokenizer
from tests.helpers.train_tiny import save_for_all_commands

COMMANDS = {
    "init": "init P O num_hidden_layers=1 hidden_size=32 num_attention_heads=2",
    "convert": "convert P O sizes=1,2,1 --no-verify",
    "export": "export R O --unroll 2 --no-verify",
    "calibrate": "calibrate R O data=T rule=latent-diff sequence_length=32 limit=4 budget=9",
    "train": "train P O data.train=T data.sequence_length=32 batch_size=2 steps=1",
}
STATES = ("live", "dead", "foreign", "other container")
EVERY = [(verb, state, force) for verb in COMMANDS for state in STATES for force in (False, True)]
SOME = [
    ("train", "live", True),
    ("train", "dead", True),
    ("convert", "other container", True),
    ("export", "foreign", True),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> SimpleNamespace:
    plain, recurrent, text = save_for_all_commands(tmp_path_factory.mktemp("locks"), tokenizer())
    return SimpleNamespace(P=plain, R=recurrent, T=text)


def arguments(verb: str, models: SimpleNamespace, out: Path) -> list[str]:
    names = {"O": str(out), **{name: str(path) for name, path in vars(models).items()}}
    words = [word.rpartition("=") for word in COMMANDS[verb].split()]
    return [key + eq + names.get(value, value) for key, eq, value in words]


def tree(folder: Path) -> dict[str, bytes]:
    """Files in `folder`, locks among them, by name; folders with an empty content."""
    return {
        str(file.relative_to(folder)): b"" if file.is_dir() else file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() or file.is_dir()
    }


def without_flock(monkeypatch) -> None:
    """As on a file system that has no locks."""

    def none(handle: int, kind: int) -> None:
        raise OSError(lock.errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(lock.fcntl, "flock", none)


def others_are_refused(out: Path) -> bool:
    """True if another process cannot enter `out`."""
    script = "import sys, pathlib\nfrom loopwise.directory import claimed\nwith claimed(pathlib.Path(sys.argv[1])): 0"
    done = subprocess.run([sys.executable, "-c", script, str(out)], cwd=ROOT, capture_output=True, text=True)
    return "another run of Loopwise writes it" in done.stderr


@contextmanager
def holder(out: Path, *host: str) -> Iterator[subprocess.Popen]:
    """Another process that holds `out`."""
    command = [sys.executable, "-m", "tests.helpers.holder", str(out), *host]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def earlier(out: Path) -> None:
    """An earlier output, with a file of the user's."""
    out.mkdir()
    (out / "model.safetensors").write_text("earlier")
    (out / RECORD).write_text('{"loopwise": "0.1.0"}')
    finish(out)
    (out / "notes.txt").write_text("mine")


def check_scenario(verb: str, state: str, force: bool, models: SimpleNamespace, folder: Path, capsys) -> None:
    """Run `verb` in a place in that `state`. It is refused in one line, and all files are there as before."""
    out, told = folder / "out", arguments(verb, models, folder / "out") + ["--force"] * force
    for name in (".out.partial-7", ".out.old-mine", ".out.partial-7-0123456789ab"):  # named as ours, and not ours
        (folder / name).mkdir()
        (folder / name / "precious").write_text("mine")
    if state == "foreign":
        out.mkdir()
        (out / "precious").write_text("mine")
        (out / "config.json").write_text("{}")
    else:
        earlier(out)
    capsys.readouterr()
    before = tree(folder)
    if state == "foreign":
        assert main(told) == 2
    elif state == "dead":
        with holder(out):
            pass
        assert main(told) == 2  # with OUT put back, and the user's file in it
    else:
        with holder(out, *(["another-host"] if state == "other container" else [])):
            before = tree(folder)
            start = time.monotonic()
            assert main(told) == 2
            assert time.monotonic() - start < 1
            assert tree(folder) == before
    assert capsys.readouterr().err.count("\n") == 1
    assert tree(folder) == before


@pytest.mark.parametrize(("verb", "state", "force"), SOME)
def test_no_file_is_lost(verb, state, force, models, tmp_path, capsys):
    check_scenario(verb, state, force, models, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "state", "force"), EVERY)
def test_no_file_is_lost_in_any_scenario(verb, state, force, models, tmp_path, capsys):
    check_scenario(verb, state, force, models, tmp_path, capsys)


def test_what_a_killed_run_left_is_removed_and_its_place_used(models, tmp_path):
    out = tmp_path / "out"
    with holder(out):
        pass
    assert len([*tmp_path.iterdir()]) == 2  # the partial directory, and the file of a lock that nobody holds
    assert main(arguments("init", models, out)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", COMMANDS)
def test_a_second_process_is_refused_at_once(verb, models, tmp_path):
    """Within a second of its own work: the start of Python and of the command line is measured apart."""
    command = [sys.executable, "-m", "loopwise"]

    def seconds(*given: str) -> tuple[float, subprocess.CompletedProcess]:
        start = time.monotonic()
        done = subprocess.run([*command, *given], capture_output=True, text=True, cwd=ROOT, check=False)
        return time.monotonic() - start, done

    base = min(seconds("--version")[0] for _ in range(3))
    out = tmp_path / "new" / "out"
    with holder(out):
        took, done = min((seconds(*arguments(verb, models, out)) for _ in range(3)), key=lambda x: x[0])
    assert done.returncode == 2
    assert "another run of Loopwise writes it" in done.stderr
    assert took - base < 1, (took, base)


def test_a_lock_is_taken_again_by_the_same_process_and_freed(tmp_path):
    out = tmp_path / "out"
    with claimed(out), locked(out):
        assert json.loads(lock_file(out).read_text())["pid"] == os.getpid()
    assert not [*tmp_path.iterdir()]
    with claimed(tmp_path / "new" / "deep" / "out"):  # whose folders are made, and go again
        assert others_are_refused(tmp_path / "new" / "deep" / "out")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_refused_command_leaves_no_folder(verb, models, tmp_path, capsys):
    missing = SimpleNamespace(P=tmp_path / "none", R=tmp_path / "none", T=models.T)
    assert main(arguments(verb, missing, tmp_path / "new" / "deep" / "out")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("way", ["alone", "launcher", "own launcher"])
def test_a_run_holds_a_place_where_nothing_stood(way, models, tmp_path, monkeypatch):
    """From before the text is read, in a folder that is not there yet."""
    import torch

    from loopwise.train import launch, worker
    from loopwise.train import run as training

    out, seen = tmp_path / "new" / "out", []

    def prepare(_: object) -> bool:
        seen.append(others_are_refused(out))
        return False

    for module in (training, launch, worker):
        monkeypatch.setattr(module, "prepare", prepare)
    if way == "own launcher":
        for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("loopwise.train.command.watched", lambda: None)
        monkeypatch.setattr(worker, "join", lambda: None)
        monkeypatch.setattr(worker, "from_first", lambda value, group: value)
        monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
        monkeypatch.setattr(worker, "_leave", lambda after, held: seen.append(others_are_refused(out)))
    options = ["--launcher", "ddp", "--processes", "2"] if way == "launcher" else []
    main([*arguments("train", models, out), *options])
    assert seen == [True] * (2 if way == "own launcher" else 1)  # there, while OUT is pushed, too
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["", *LAUNCHERS])
def test_a_living_run_is_not_taken_for_a_killed_one(launcher, models, tmp_path, capsys):
    """From its first second, and in a folder that its own run makes."""
    out = tmp_path / "new" / "out"
    options = ["--launcher", launcher, "--processes", "2"] if launcher else []
    told = [word.replace("steps=1", "steps=100000") for word in arguments("train", models, out)]
    command = [sys.executable, "-m", "loopwise", *told, "save_every=5", "log_every=5", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            for place in (lock_file(out), out / "checkpoint-5"):
                deadline = time.monotonic() + 240
                while not place.exists():
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                for option in ("--resume", "--force"):
                    start = time.monotonic()
                    assert main([*told, option]) == 2
                    assert time.monotonic() - start < 1
                    assert "another run of Loopwise writes it" in capsys.readouterr().err
        finally:
            process.terminate()
    assert process.returncode == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    assert [path for path in out.iterdir() if path.name.startswith("checkpoint-")]


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("content", ["precious", '{"run": "mine"}', None], ids=["text", "JSON", "a FIFO"])
def test_a_file_of_others_with_the_name_of_a_lock_stays(verb, content, models, tmp_path, capsys):
    file = lock_file(tmp_path / "out")
    if content is None:
        os.mkfifo(file)
    else:
        file.write_text(content)
        os.link(file, tmp_path / "the same file")
    before = tree(tmp_path)
    assert main(arguments(verb, models, tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert f"{file} has the name of Loopwise's lock, and is none; move it elsewhere" in message
    assert message.count("\n") == 1
    assert tree(tmp_path) == before
    assert file.exists()


def test_a_file_that_others_put_in_the_place_of_a_lock_stays(tmp_path):
    with claimed(tmp_path / "out"):
        lock_file(tmp_path / "out").unlink()
        lock_file(tmp_path / "out").write_text("precious")
    assert tree(tmp_path) == {".out.lock": b"precious"}


@pytest.mark.parametrize("flock", [True, False])
def test_a_lock_passes_from_one_process_to_the_next(flock, tmp_path):
    """Its file is removed by each holder; nobody may lock a file that is gone. It begins with that of a killed one."""
    absent = "def absent(*_): raise OSError(lock.errno.ENOLCK, 'none')\nlock.fcntl.flock = absent\n"
    script = (
        "import sys, time, pathlib\nfrom loopwise import lock\nfrom loopwise.lock import locked\n"
        f"{'' if flock else absent}"
        "counter = pathlib.Path(sys.argv[1])\n"
        "for _ in range(20):\n"
        "    with locked(counter, wait=60):\n"
        "        n = int(counter.read_text()); time.sleep(0.001); counter.write_text(str(n + 1))\n"
    )
    counter = tmp_path / "counter"
    counter.write_text("0")
    lock_file(counter).write_text(json.dumps({**marker(), "run": "0123456789ab", "pid": 999999999}))
    command = [sys.executable, "-c", script, str(counter)]
    running = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]
    assert [process.wait(120) for process in running] == [0, 0, 0, 0]
    assert counter.read_text() == "80"


@pytest.mark.parametrize(
    ("change", "ended"),
    [
        ({}, False),
        ({"pid": 999999999}, True),
        ({"started": "1"}, True),  # another process has its number now
        ({"boot": "before"}, True),
        ({"host": "another", "pid": 999999999}, False),  # nobody here can know
        ({"boot": ""}, False),
    ],
)
def test_a_marker_shows_the_end_of_its_process(change, ended):
    assert has_ended({**marker(), **change}) == ended


def test_without_locks_of_the_file_system_the_marker_decides(tmp_path, monkeypatch):
    without_flock(monkeypatch)
    out = tmp_path / "out"
    mark = {**marker(), "run": "0123456789ab", "pid": os.getppid(), "started": lock._started(os.getppid())}
    lock_file(out).write_text(json.dumps(mark))
    with pytest.raises(UserError, match=rf"process {os.getppid()} on {socket.gethostname()}"), claimed(out):
        pass
    lock_file(out).write_text(json.dumps({**mark, "host": "another"}))
    with pytest.raises(UserError, match="on another"), claimed(out):
        pass
    lock_file(out).write_text(json.dumps({**mark, "started": "1"}))
    with claimed(out):
        pass


def test_without_locks_of_the_file_system_one_process_makes_the_file(tmp_path, monkeypatch):
    """Between its making and its marker, and where two find the marker of one that has ended."""
    without_flock(monkeypatch)
    file, write, tried = lock_file(tmp_path / "out"), lock._mark, []

    def mark(handle: int, place: Path) -> None:
        if not tried:
            tried.append("now")
            tried.append(lock._take(file))  # as another process would
        write(handle, place)

    monkeypatch.setattr(lock, "_mark", mark)
    ended = {**marker(), "run": "0123456789ab", "pid": 999999999}
    file.write_text(json.dumps(ended))
    handle = lock._take(file)
    assert handle is not None
    assert tried == ["now", None]
    os.close(handle)
    assert lock._clear(file, ended)  # by a process that has read the old marker, and comes late
    assert json.loads(file.read_text())["run"] == lock.RUN
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_two_runs_keep_one_cache_entry(tmp_path):
    """A partial entry of a killed run with our process id, as in containers, is no obstacle."""
    from loopwise.train.data.cache import DONE, keep

    folder = tmp_path / "cache" / "entry"
    stale = folder.with_name(f".entry.partial-{os.getpid()}")
    stale.mkdir(parents=True)
    (stale / "tokens.npy").touch()
    keep(folder, {"tokens": np.arange(3)})
    keep(folder, {"tokens": np.arange(4)})  # written meanwhile: it stays
    assert (folder / DONE).is_file()
    assert len(np.load(folder / "tokens.npy")) == 3
    assert sorted(path.name for path in folder.parent.iterdir()) == [stale.name, "entry"]


def test_force_spares_a_directory_with_files_of_others(tmp_path):
    out = tmp_path / "out"
    with new_directory(out, None, False) as made:
        (made / "inner").mkdir()
        (made / "inner" / "weights").touch()
    check_replaceable(out, True)
    (out / "inner" / "mine").touch()
    with pytest.raises(UserError, match="not inner/mine; move that elsewhere"):
        check_replaceable(out, True)


def test_an_output_carries_no_code_but_ours(tmp_path):
    from loopwise.carried import copy_model_code

    with new_directory(tmp_path / "out", None, False) as made:
        copy_model_code(made)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert "modeling_recurrent_depth.py" in record["code"]
    assert is_ours(tmp_path / "out")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "call.py").write_text("import os\n")
    with pytest.raises(UserError, match=r"call\.py is not Loopwise's own code"):
        finish(foreign)
