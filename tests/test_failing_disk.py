"""A disk that fails in the middle: EIO, EDQUOT and ENOSPC of every call that writes. One line, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loopwise.cli import main
from tests.helpers.repository import ROOT
from tests.helpers.tiny import save_source

EIO, EDQUOT, ENOSPC = errno.EIO, errno.EDQUOT, errno.ENOSPC
RECIPE = ["sizes=2,2,2", "num_recurrences=2", "--no-verify"]
TEXT = "the core runs again while depth grows with every pass\n\n" * 40
RUN = ["data.train={folder}/text.txt", "data.sequence_length=32", "batch_size=2", "steps=2", "save_every=1"]
EVAL = ["data={folder}/text.txt", "sequence_length=32", "num_recurrences=1", "--out", "{{top}}/result.json"]

# The command that meets the fault; those before it; the one that goes on once the fault has gone.
CONVERT = ["convert", "{folder}/source", "{{out}}", *RECIPE]
TRAIN = ["train", "{folder}/model", "{{out}}", *RUN]
JOBS: dict[str, dict[str, Any]] = {
    "convert": {"command": CONVERT},
    "convert --force": {"setup": [[*CONVERT, "seed=5"]], "command": [*CONVERT, "--force"]},
    "convert --resume": {"command": [*CONVERT, "--resume"], "again": [*CONVERT, "--resume"]},
    "export": {"command": ["export", "{folder}/plain", "{{out}}", "--unroll", "2", "--no-verify"]},
    "eval": {"command": ["eval", "{folder}/model", *EVAL]},
    "train": {"command": TRAIN, "again": TRAIN, "resume": [*TRAIN, "--resume"]},
    "train --force": {
        "setup": [CONVERT],
        "command": [*TRAIN, "--force"],
        "again": [*TRAIN, "--force"],
        "resume": [*TRAIN, "--resume"],
    },
}
EVERYWHERE = [  # every kind of call, at its beginning, in between, and at its end
    [kind, (EIO, EDQUOT, ENOSPC)[(place + start) % 3], place % 2 == 1 and kind != "rename", place / 4]
    for start, kind in enumerate(("make", "write", "sync", "close", "rename"))
    for place in range(5)
]
FEW = {
    "convert --force": [["write", EDQUOT, True, 0.6], ["sync", EIO, False, 0.5], ["rename", EIO, False, 1]],
    "export": [["sync", EDQUOT, False, 1]],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_source(folder / "source")
    assert main(["convert", str(folder / "source"), str(folder / "model"), *RECIPE]) == 0
    plain = ["injection=none", "state_init=input"]
    assert main(["convert", str(folder / "source"), str(folder / "plain"), *RECIPE, *plain]) == 0
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The disk's faults, compiled: as torch.compile does, this needs a compiler."""
    found = tmp_path_factory.mktemp("library") / "disk_faults.so"
    source = str(ROOT / "tests/helpers/disk_faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(found), source, "-ldl"], check=True)
    return found


def filled(value: Any, folder: Path) -> Any:
    """`value` with {folder} replaced in all its texts."""
    if isinstance(value, list):
        return [filled(each, folder) for each in value]
    return value.format(folder=folder) if isinstance(value, str) else value


def runs(faults: dict[str, list], models: Path, library: Path, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By job: the run without a fault, then one for each of `faults`."""
    jobs = {}
    for name in faults:
        job = {"setup": [], "again": None, "faults": faults[name]}
        jobs[name] = job | {key: filled(value, models) for key, value in JOBS[name].items()}
    command = [sys.executable, "-m", "tests.helpers.run_disk_faults", str(folder), json.dumps(jobs)]
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in faults}
    for line in done.stdout.splitlines():
        run = json.loads(line)
        found[run.pop("job")].append(run)
    return found


def weights(contents: dict[str, str]) -> dict[str, str]:
    """Weights, tokenizer and results: files whose bytes are the same in every run, and the names of the others."""
    dated = ("loopwise.json", "run.json", "README.md", "trainer_state.json", "training_args.bin", "result.json")
    dated += ("train_recipe.yaml",)  # which names OUT
    return {name: "" if name.endswith(dated) else value for name, value in contents.items()}


def check_all(whole: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """Raises AssertionError with all that is wrong in a job's runs."""
    assert whole["code"] == 0, whole["lines"]
    wrong = []
    for each in found:
        try:
            check(whole, each)
        except AssertionError as error:
            wrong.append(str(error)[:600])
    assert not wrong, "\n\n".join(wrong)


def check(whole: dict[str, Any], found: dict[str, Any]) -> None:
    """One line and exit code 2, with everything as it was; or a whole output, where the fault cost nothing."""
    fault, after = found["fault"], found["after"]
    assert found["failed"] > 0, fault
    assert not [name for name in after if ".lock" in name or ".old-" in name], (fault, [*after])
    if found["code"] == 0:
        assert weights(after) == weights(whole["after"]), fault
        return
    errors = [line for line in found["lines"] if "error" in line.lower()]
    assert found["code"] == 2, (fault, found["lines"])
    assert len(errors) == 1, (fault, found["lines"])
    assert errors[0].startswith("loopwise: error: "), (fault, errors)
    torch_s = "Input/output error or Disk quota exceeded"  # its errors have no number
    assert os.strerror(fault[1]) in errors[0] or torch_s in errors[0], (fault, errors)
    assert "what was to be printed" not in errors[0], (fault, errors)
    resumed = "again" in found
    begun = [name for name in after if name.startswith("out/checkpoint-")]
    kept = [name for name in after if name.startswith(".out.partial-")]
    if not begun and not (resumed and "goes on from here" in errors[0]):
        assert after == found["before"], (fault, errors)
    assert bool(kept) <= ("goes on from here" in errors[0]), (fault, kept)
    assert not [name for name in begun if ".partial" in name]
    if resumed:
        assert found["again"]["code"] == 0, (fault, found["again"])
        assert weights(found["finally"]) == weights(whole["after"]), fault


def test_a_fault_loses_nothing(models, library, tmp_path):
    for name, (whole, *found) in runs(FEW, models, library, tmp_path).items():
        check_all(whole, found)
        assert [each["code"] for each in found] == [2] * len(found), name


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_faults_everywhere_lose_nothing(name, models, library, tmp_path):
    whole, *found = runs({name: EVERYWHERE}, models, library, tmp_path)[name]
    check_all(whole, found)
    refused = sum(each["code"] == 2 for each in found)
    print(f"{name}: {len(found)} faults, {refused} refused, calls {whole['counts']}")
    assert refused >= len(found) * 0.8


def test_a_disk_s_errors_are_named(tmp_path, monkeypatch, capsys):
    """Open files name no file in their errors, and numpy gives no number."""
    import numpy as np

    from loopwise.cli import guarded
    from loopwise.disk import naming

    def written(error: OSError) -> int:
        def run(argv: list[str]) -> int:
            with naming(tmp_path / "tokens.npy"):
                np.save(tmp_path / "tokens.npy", np.zeros(3))
                raise error

        return guarded(run, [])

    for error, reason in (
        (OSError("100 requested and 3 written"), "Input/output error"),
        (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
    ):
        assert written(error) == 2
        assert capsys.readouterr().err == f"loopwise: error: {tmp_path / 'tokens.npy'}: {reason}\n"


def test_news_that_cannot_be_written_end_nothing(tmp_path):
    """The log of a server: a full or failing disk behind stderr."""
    import io

    from loopwise.streams import _Lossy

    class Failing(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: object, /) -> int:
            raise OSError(errno.EIO, "Input/output error")

    stream = _Lossy(io.BufferedWriter(Failing()), "utf-8", line_buffering=True)
    print("news", file=stream)
    stream.flush()


def test_room_for_a_teacher_s_values_is_taken_at_once(tmp_path, monkeypatch):
    """Values that are written through memory kill the process where the disk has no room for them later."""
    from types import SimpleNamespace

    from loopwise.train import teacher

    blocks: Any = SimpleNamespace(directory=tmp_path, train=SimpleNamespace(tokens=SimpleNamespace(shape=(64, 128))))
    teacher.allocate(SimpleNamespace(top_k=16), blocks)  # pyright: ignore[reportArgumentType]
    for name in teacher.FILES:
        assert (tmp_path / name).stat().st_blocks * 512 >= 64 * 128 * 16 * 4

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*teacher_ids\.npy'"):
        teacher.allocate(SimpleNamespace(top_k=16), blocks)  # pyright: ignore[reportArgumentType]
