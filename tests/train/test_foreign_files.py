"""Files of the user among those of a run: `--force`, `--resume`, checkpoints and the final model leave them whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from loopwise.cli import main
from loopwise.directory import check_nothing_foreign
from loopwise.foreign import foreign_file, is_run_file
from loopwise.train import prepare, publish, teacher
from loopwise.train import run as training
from loopwise.train.checkpoint import commit, last_sound, prune
from tests.helpers.train_tiny import run

# With right answers of held-out conversations, each in a row of its own, as it is by default.
SETTINGS = ["steps=2", "save_every=1", "data.eval=task:parity?records=8", "data.group=length"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(plain, command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    run(command(plain, out, *SETTINGS))
    return out


@pytest.fixture(scope="module")
def stopped(plain, command, tmp_path_factory) -> Path:
    """A run that was killed behind its last step."""
    out = tmp_path_factory.mktemp("stopped") / "out"

    def killed(*_: object) -> bool:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_finish", killed)
        assert main(command(plain, out, *SETTINGS)) == 130
    return out


PLACES = ("checkpoint-2/notes.txt", "checkpoint-9/weights", "runs/mine/x", "tokens/x", "config.png")


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_force_spares_files_inside_a_run(name, state, plain, command, request, tmp_path, capsys):
    out = shutil.copytree(request.getfixturevalue(state), tmp_path / "out")
    check_nothing_foreign(out)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    before = files(out)
    assert main([*command(plain, out, *SETTINGS), "--force"]) == 2
    message = capsys.readouterr().err
    assert f"--force replaces only what Loopwise wrote, and not {name}; move that elsewhere" in message
    assert files(out) == before


def test_all_files_of_a_run_count_as_its_own(stopped, plain, command, tmp_path):
    """Those that runs really left, of every kind of data, and of a teacher."""
    assert (stopped / "tokens" / "alone.npy").is_file()
    assert foreign_file(stopped, {"loopwise.json"}, run=True) is None
    out, names = tmp_path / "out", set[str]()

    def killed(*_: object) -> bool:
        names.update(files(out))
        raise KeyboardInterrupt

    taught = [f"objectives.distillation.teacher={plain}", "objectives.distillation.top_k=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_finish", killed)
        assert main(command(plain, out, "steps=1", "data.eval_fraction=0.2", *taught)) == 130
    assert {f"tokens/{name}" for name in (*teacher.FILES, teacher.DONE)} <= names
    assert all(map(is_run_file, names))
    assert is_run_file("runs/Nov30_12-00-00_node/events.out.tfevents.1700000000.node.1.0")
    assert is_run_file("emissions.csv")
    assert not any(map(is_run_file, ("tokens/mine.npy", "runs/mine", "tokens/a/facts.json", "run.json", "facts.json")))


@pytest.mark.parametrize("lost", [None, "alone.npy", "held_out_answers.npy", "train_marks.npy"])
def test_a_run_with_answers_goes_on(lost, finished, stopped, plain, command, tmp_path):
    """It ends with the measurements of one that was never stopped, also where a file of its tokens is lost."""
    out = shutil.copytree(stopped, tmp_path / "out")
    if lost:
        (out / "tokens" / lost).unlink()
    run([*command(plain, out, *SETTINGS), "--resume"])
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (finished, out)]
    ends = [{name: value for name, value in log[-1].items() if name.startswith("eval_accuracy")} for log in logs]
    assert len(ends[0]) > 1
    assert ends[0] == ends[1]
    assert not (out / "tokens").exists()
    run([*command(plain, out, *SETTINGS), "--force"])


@pytest.mark.parametrize("option", ["--resume", "--force"])
def test_files_of_the_system_are_nobody_s(option, stopped, plain, command, tmp_path):
    """A file browser and Python leave them in any folder."""
    out = shutil.copytree(stopped, tmp_path / "out")
    for folder in (out, out / "tokens", out / "checkpoint-2"):
        (folder / ".DS_Store").write_bytes(b"\0")
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__" / "x.pyc").touch()
    (out / "emissions.csv").write_text("of codecarbon")
    (out / "tokens" / "alone.npy").unlink()  # so that the tokens are made anew
    run([*command(plain, out, *SETTINGS), option])
    assert not (out / "tokens").exists()
    assert (out / "config.json").is_file()


def test_force_puts_back_what_it_was_to_replace(finished, plain, command, tmp_path, monkeypatch, capsys):
    """A run that fails before its first checkpoint leaves the earlier one, whatever it wrote, and the system."""
    out = shutil.copytree(finished, tmp_path / "out")
    before = files(out)

    def fail(*_: object) -> None:
        assert (out / "tokens" / "alone.npy").is_file()
        for name in (".DS_Store", "tokens/.DS_Store", "emissions.csv"):
            (out / name).touch()
        raise RuntimeError("as the machine wills")

    monkeypatch.setattr(training, "work", fail)
    with pytest.raises(RuntimeError):
        main(command(plain, out, *SETTINGS, "--force"))
    assert capsys.readouterr().err == ""
    assert files(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [True, False])
def test_a_file_that_comes_while_the_text_is_tokenised_stays(
    force, finished, plain, command, tmp_path, monkeypatch, capsys
):
    """--force looks at OUT again before it moves it; a run without it, before it makes it."""
    out, tokenise = tmp_path / "out", prepare._tokenise
    if force:
        shutil.copytree(finished, out)
    before = files(out) if force else {}

    def meanwhile(*given):
        (out / "tokens").mkdir(parents=True)
        (out / "tokens" / "notes.txt").write_text("mine")
        return tokenise(*given)

    monkeypatch.setattr(prepare, "_tokenise", meanwhile)
    assert main([*command(plain, out, *SETTINGS), *["--force"] * force]) == 2
    message = capsys.readouterr().err
    assert ("and not tokens/notes.txt" if force else "not empty") in message
    assert message.count("\n") == 1
    assert files(out) == {**before, "tokens/notes.txt": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["config.json", "checkpoint-7/weights"])
def test_what_force_replaced_stays_until_the_run_has_written(
    name, finished, plain, command, tmp_path, monkeypatch, capsys
):
    """A file of the user with the name of a result is none: the run fails before its first checkpoint."""
    out = shutil.copytree(finished, tmp_path / "out")
    before = files(out)

    def fail(*_: object) -> None:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        raise RuntimeError("as the machine wills")

    monkeypatch.setattr(training, "work", fail)
    with pytest.raises(RuntimeError):
        main(command(plain, out, *SETTINGS, "--force"))
    assert main(command(plain, out, *SETTINGS)) == 2
    old = next(path for path in tmp_path.iterdir() if path != out)
    assert f"what --force was to replace is in {old}" in capsys.readouterr().err
    assert files(old) == before
    assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["README.md", "config.json", "loopwise.json", "model.safetensors", "tokens/x"])
def test_resume_refuses_a_file_in_the_place_of_its_own(name, stopped, plain, command, tmp_path, capsys):
    out = shutil.copytree(stopped, tmp_path / "out")
    (out / name).write_text('{"mine": 1}')
    before = files(out)
    arguments = [*command(plain, out, *SETTINGS), "--resume"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert f"{out / name} is not of this run, whose own file would replace it; move it elsewhere" in message
    assert message.count("\n") == 1
    assert files(out) == before
    if name == "README.md":
        (out / name).unlink()
        run(arguments)
        assert (out / name).is_file()


def test_files_that_come_during_a_run_are_kept(plain, command, tmp_path, monkeypatch, capsys):
    out, finish = tmp_path / "out", training._finish

    def meanwhile(*given):
        for name in ("README.md", "README.md.kept", "tokens/notes.txt", "checkpoint-1/eval.json"):
            (out / name).write_text(f"mine: {name}")
        (out / "loopwise.json").mkdir()
        (out / "loopwise.json" / "x").write_text("mine")
        return finish(*given)

    monkeypatch.setattr(training, "_finish", meanwhile)
    run(command(plain, out, *SETTINGS))
    told = capsys.readouterr().err
    assert f"{out / 'README.md'} is not of this run, so it is now README.md.kept-2\n" in told
    assert (out / "README.md").read_text().startswith("---\n")
    assert (out / "README.md.kept").read_text() == "mine: README.md.kept"
    assert (out / "README.md.kept-2").read_text() == "mine: README.md"
    assert (out / "loopwise.json.kept" / "x").read_text() == "mine"
    assert [path.name for path in (out / "tokens").iterdir()] == ["notes.txt"]
    assert (out / "checkpoint-1" / "eval.json").is_file()
    listed = json.loads((out / "loopwise.json").read_text())["files"]
    assert "README.md" in listed
    assert not [name for name in listed if "kept" in name]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_model_that_is_moved_in_part(error, stopped, plain, command, tmp_path, monkeypatch, capsys):
    """An error takes back what it has moved, and gives a user's file its name again; a kill does not, and the next
    call knows its own files."""
    out, replace, move = shutil.copytree(stopped, tmp_path / "out"), Path.replace, publish._move
    before = files(out)

    def fails(path: Path, target: Path) -> Path:
        if path.name == "config.json" and path.parent.name == ".final.partial":
            raise error
        return replace(path, target)

    def meanwhile(*given):
        (out / "README.md").write_text("mine")
        return move(*given)

    arguments = [*command(plain, out, *SETTINGS), "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        patch.setattr(publish, "_move", meanwhile)
        assert main(arguments) == (2 if isinstance(error, OSError) else 130)
    if isinstance(error, OSError):
        assert files(out) == {**before, "README.md": b"mine"}
        (out / "README.md").unlink()
    else:
        assert (out / "README.md.kept").read_text() == "mine"
        assert (out / "model.safetensors").is_file()
    run(arguments)
    assert (out / "config.json").is_file()


def test_checkpoints_with_files_of_others_are_kept(tmp_path, capsys):
    """In the pruning of old ones, and where a new one takes the place of a damaged one."""
    for step in (1, 2, 3, 4):
        partial = tmp_path / ".partial"
        partial.mkdir()
        (partial / "weights").write_text(str(step))
        commit(partial, tmp_path / f"checkpoint-{step}", {}, {})
    (tmp_path / "checkpoint-1" / "eval.json").write_text("mine")
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "weights").write_text("of another program")
    os.truncate(tmp_path / "checkpoint-4" / "weights", 0)
    assert last_sound(tmp_path, thorough=True)[0] == tmp_path / "checkpoint-3"
    for _ in range(2):
        prune(tmp_path, 1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-7"]
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in sorted(told)] == [
        "kept, as eval.json in it is not of this run; remove it yourself",
        "kept, as weights in it is not of this run; remove it yourself",
    ]
    partial = tmp_path / ".partial"
    partial.mkdir()
    commit(partial, tmp_path / "checkpoint-7", {}, {})
    assert (tmp_path / "checkpoint-7.kept" / "weights").read_text() == "of another program"
    assert "so it is now checkpoint-7.kept\n" in capsys.readouterr().err
