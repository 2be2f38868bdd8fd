"""A killed conversion goes on with `--resume`: nothing that is finished is made again, and no byte differs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loopwise.cli import main
from loopwise.convert import ConvertRecipe, conversion, convert_checkpoint, pipeline, workers
from loopwise.convert.journal import JOURNAL
from loopwise.convert.pending import units
from loopwise.convert.shards import Shards
from loopwise.directory import RECORD
from loopwise.errors import UserError
from loopwise.recipe import validate
from tests.helpers.convert import refused
from tests.helpers.repository import ROOT
from tests.helpers.run_kills import MOMENTS
from tests.helpers.tiny import save_source

KEYS = ["method=recursive", "loops=2", "init=average", "lora.rank=8"]
UNITS = 51  # of that conversion: the factors of 21 matrices, and 30 tensors of one unit each


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a source, its conversion `whole`, and one that was killed for each moment."""
    folder = tmp_path_factory.mktemp("killed")
    source = save_source(folder / "source")
    assert main(["convert", str(source), str(folder / "whole"), *KEYS]) == 0
    argv = [sys.executable, "-m", "tests.helpers.run_kills", str(folder), str(source), *KEYS]
    subprocess.run(argv, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The names of the tensors that this process makes from now on."""
    names: list[str] = []
    write = Shards.write

    def noted(self: Any, unit: Any) -> Any:
        names.extend(tensor.name for tensor in unit)
        return write(self, unit)

    monkeypatch.setattr(Shards, "write", noted)
    return names


def killed(place: Path, moment: str, folder: Path) -> Path:
    """A copy of what the conversion that was killed at `moment` left, in `folder`; the OUT that it was to make."""
    shutil.copytree(place / moment, folder / moment, ignore=shutil.ignore_patterns("*.lock"))
    return folder / moment / "out"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_conversion_goes_on(moment, place, made, tmp_path):
    out = killed(place, moment, tmp_path)
    (left,) = out.parent.glob(".out.partial-*")
    whole_lines = (left / JOURNAL).read_bytes().split(b"\n")[1:-1]
    finished = {name for line in whole_lines for name in json.loads(line)["tensors"]}
    assert len(whole_lines) == (
        int(moment) if moment.isdigit() else {"values": 20, "line": 29, "verify": UNITS}[moment]
    )
    assert main(["convert", str(place / "source"), str(out), *KEYS, "--resume"]) == 0
    assert contents(out) == contents(place / "whole")
    assert not finished & set(made)
    assert len(finished) + len(made) == len(set(made) | finished)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_values_that_were_lost_are_made_again(place, made, tmp_path):
    """As after a crash of the system: the journal names tensors whose values never reached the disk."""
    out = killed(place, "40", tmp_path)
    (left,) = out.parent.glob(".out.partial-*")
    with open(left / "model.safetensors", "r+b") as file:
        file.seek(100_000)
        file.write(bytes(200))
    assert main(["convert", str(place / "source"), str(out), *KEYS, "--resume"]) == 0
    assert contents(out) == contents(place / "whole")
    assert len(made) < 70


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ([*KEYS[:3], "lora.rank=4"], "recipe.lora.rank was 8 and is 4; make them equal, or leave --resume out"),
        (KEYS, "source.model.safetensors.changed was "),
        ([*KEYS, "--dry-run"], "source.model.safetensors.changed was "),
    ],
)
def test_another_conversion_is_refused(keys, line, place, capsys, tmp_path):
    """And what the killed one left stays, until a run without --resume removes it."""
    out, source = killed(place, "40", tmp_path), tmp_path / "source"
    shutil.copytree(place / "source", source)  # with its times
    if keys[3] == KEYS[3]:
        os.utime(source / "model.safetensors", (1, 1))
    assert line in refused(capsys, tmp_path, source, out, *keys, "--resume")
    if "--dry-run" not in keys:
        assert main(["convert", str(source), str(out), *keys]) == 0
        assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_only_what_a_killed_conversion_left_is_taken(place, capsys, tmp_path):
    """Neither a directory of that name by another, nor one without a journal; a finished OUT is whole already."""
    out = killed(place, "40", tmp_path)
    (left,) = out.parent.glob(".out.partial-*")
    (left / RECORD).unlink()
    before = contents(left)
    assert main(["convert", str(place / "source"), str(out), *KEYS, "--resume"]) == 0
    assert contents(left) == before
    assert contents(out) == contents(place / "whole")
    capsys.readouterr()
    assert main(["convert", str(place / "source"), str(out), *KEYS, "--resume"]) == 0
    assert "nothing is made again" in capsys.readouterr().out
    assert main(["convert", str(place / "source"), str(out), *KEYS, "num_recurrences=7", "--resume"]) == 2
    assert "recipe.num_recurrences was " in capsys.readouterr().err


@pytest.mark.parametrize("resume", [["--resume"], []], ids=["resumed", "anew"])
def test_what_a_killed_conversion_left_counts_as_room(resume, place, monkeypatch, capsys, tmp_path):
    """It is taken over, or removed. A disk with a byte too few is refused at once, and the rest stays."""
    out = killed(place, "40", tmp_path)
    (left,) = out.parent.glob(".out.partial-*")
    os.truncate(left / "model.safetensors", 400_000)  # a copy may have filled its holes
    needed = (place / "whole" / "model.safetensors").stat().st_size
    there = sum(file.stat().st_blocks * 512 for file in out.parent.rglob("*") if file.is_file())
    assert 0 < there < needed
    for missing, code in ((1, 2), (0, 0)):
        free = needed - there - missing
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        before = contents(tmp_path / "40")
        assert main(["convert", str(place / "source"), str(out), *KEYS, *resume]) == code
        assert code == 0 or contents(tmp_path / "40") == before
        assert ("out: the output will take 0." in capsys.readouterr().err) == (code == 2)
    assert contents(out) == contents(place / "whole")


@pytest.mark.parametrize(
    ("error", "code", "stays"),
    [
        (KeyboardInterrupt(), 130, True),
        (OSError(28, "No space left on device"), 2, True),
        (UserError("verification failed"), 2, False),  # would fail again
    ],
)
def test_an_interrupted_one_stays_if_it_is_to_be_resumed(
    error, code, stays, place, made, monkeypatch, capsys, tmp_path
):
    def fails(*_: object) -> None:
        raise error

    argv = ["convert", str(place / "source"), str(tmp_path / "out"), *KEYS]
    with monkeypatch.context() as patch:
        patch.setattr(convert_checkpoint, "verify", fails)
        assert main(argv) == code
        assert list(tmp_path.iterdir()) == []
        assert main([*argv, "--resume"]) == code
    assert [path.name.rpartition("-")[0].rpartition("-")[0] for path in tmp_path.iterdir()] == [".out.partial"] * stays
    made.clear()
    assert main([*argv, "--resume"]) == 0
    assert (made == []) == stays
    assert contents(tmp_path / "out") == contents(place / "whole")


def test_two_workers_write_the_same_bytes(place, monkeypatch, tmp_path):
    """Every file is equal, in shards, too; this process writes no tensor itself."""
    monkeypatch.setattr(conversion, "SHARD_BYTES", 100_000)
    argv = ["convert", str(place / "source"), "OUT", *KEYS, "--no-verify"]
    assert main([str(tmp_path / "one") if word == "OUT" else word for word in argv]) == 0
    monkeypatch.setattr(Shards, "write", None)
    assert main([*(str(tmp_path / "two") if word == "OUT" else word for word in argv), "workers=2"]) == 0
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 5
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(("moment", "written"), [("start", []), ("work", []), ("reply", []), ("idle", [0])])
def test_a_worker_that_is_killed_ends_the_others(moment, written, monkeypatch, tmp_path):
    """At once, whatever they do; the units before are there."""
    monkeypatch.setattr(workers, "MODULE", "tests.helpers.run_dying_worker")
    recipe = validate(ConvertRecipe, {"method": "recursive", "loops": 2, "workers": 2})
    found: list[int] = []
    start = time.monotonic()
    units = workers.work(workers.Job(Path(moment), recipe, tmp_path, 1, ""), [0, 1])
    with pytest.raises(ChildProcessError, match=r"a worker process was killed by signal 9, .*; try fewer workers"):
        found.extend(number for number, _ in units)
    assert found == written
    assert time.monotonic() - start < 60
    for process in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(process.name), 0)


def test_what_workers_have_finished_stays_for_resume(place, made, monkeypatch, capsys, tmp_path):
    """Without --resume, too: a process that the system kills is no choice of the user's."""

    def dying(job: workers.Job, todo: list[int]) -> Any:
        with pipeline.opened(job.path, job.recipe) as opened:
            shards, every = Shards(opened.pending, job.directory, job.shard_bytes), units(opened.pending)
            for number in todo[:30]:
                yield number, shards.write(every[number])
        raise ChildProcessError(0, "a worker process was killed by signal 9")

    argv = ["convert", str(place / "source"), str(tmp_path / "out"), *KEYS]
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "work", dying)
        assert main([*argv, "workers=2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("a worker process was killed by signal 9; --resume goes on from here")
    finished = {*made}
    made.clear()
    assert main([*argv, "--resume"]) == 0
    assert finished
    assert not finished & {*made}
    assert contents(tmp_path / "out") == contents(place / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def workers_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def runs(process: int) -> bool:
    """True where the process has not ended; one that has may wait for its parent to look at it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["parent", "worker"])
def test_killed_workers(victim, place, tmp_path):
    """The death of the parent ends its workers; that of a worker is an error in one line."""
    argv = ["convert", str(place / "source"), str(tmp_path / "out"), *KEYS, "--resume"]
    command = [sys.executable, "-m", "loopwise", *argv[:-1], "workers=2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    journal: list[Path] = []
    while not journal or journal[0].read_text().count("\n") < 3:
        time.sleep(0.001)
        journal = list(tmp_path.glob(f".out.partial-*/{JOURNAL}"))
    children, deadline = workers_of(process), time.monotonic() + 30
    assert len(children) == 2
    os.kill(process.pid if victim == "parent" else children[0], signal.SIGKILL)
    _, printed = process.communicate(timeout=60)
    while running := [child for child in children if runs(child)]:
        assert time.monotonic() < deadline, running
        time.sleep(0.05)
    if victim == "worker":
        assert process.returncode == 2
        line = printed.strip().splitlines()[-1]
        assert "a worker process was killed by signal 9, as where memory is short; try fewer workers" in line
        assert line.endswith("; --resume goes on from here")
    assert main(argv) == 0
    assert contents(tmp_path / "out") == contents(place / "whole")


def test_a_read_error_of_the_source_leaves_the_work(place, made, capsys, monkeypatch, tmp_path):
    """A network file system may give the file at the next attempt."""
    hashing = conversion.hashing
    monkeypatch.setattr(conversion, "hashing", lambda files: hashing([*files, tmp_path / "gone"]))
    argv = ["convert", str(place / "source"), str(tmp_path / "out"), *KEYS, "--resume"]
    assert main(argv) == 2
    assert f"{tmp_path / 'gone'} cannot be read: No such file or directory; --resume goes on" in capsys.readouterr().err
    assert len(made) > UNITS
    made.clear()
    monkeypatch.setattr(conversion, "hashing", hashing)
    assert main(argv) == 0
    assert made == []
    assert contents(tmp_path / "out").keys() == contents(place / "whole").keys()
