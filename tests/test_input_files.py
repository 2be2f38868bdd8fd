"""Files that others have made: kinds, links and encodings of files, and programs in them."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loopwise.bounded import bounded
from loopwise.checkpoint import config_fields, read_json
from loopwise.cli import guarded, main
from loopwise.errors import UserError
from loopwise.input_files import check_entries, check_inside, check_regular
from loopwise.load import read_tokenizer
from loopwise.train.data.sources import files_of
from tests.helpers.repository import ROOT, git
from tests.helpers.serve_tiny import tokenizer
from tests.helpers.train_tiny import save_recurrent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_recurrent(tmp_path_factory.mktemp("files") / "model", tokenizer(), {"eos_token_id": 257})


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


KINDS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "a FIFO": (os.mkfifo, "a FIFO"),
    "a socket": (_socket, "a socket"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "a link out": (lambda path: path.symlink_to(Path(sys.executable).resolve()), "outside of the source"),
    "a loop": (lambda path: path.symlink_to(path.name), None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "LICENSE"])
def test_a_checkpoint_s_files_are_regular_and_inside(kind, name, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    (folder / name).unlink(missing_ok=True)
    make, said = KINDS[kind]
    make(folder / name)
    if kind == "a loop" and name != "config.json":
        return  # there is no such file, and `inspect` needs none
    start = time.monotonic()
    assert main(["inspect", str(folder)]) == 2
    line = capsys.readouterr().err
    assert time.monotonic() - start < 5
    assert line.count("\n") == 1
    assert said is None or said in line


def test_links_within_and_into_the_hub_s_cache_are_read(model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.copytree(model, tmp_path / "hub" / "blobs")
    folder = tmp_path / "m"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(tmp_path / "hub" / "blobs" / file.name)
    (folder / "again.json").symlink_to("config.json")
    assert config_fields(folder)["model_type"] == "recurrent_depth"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="outside of the source"):
        check_entries(folder)


@pytest.mark.parametrize(
    ("folder", "target", "fine"),
    [
        ("models--o--m/snapshots/c", "models--o--m/blobs/x", True),
        ("datasets--o--m/snapshots/c/inner", "datasets--o--m/blobs/x", True),
        ("models--o--m/snapshots/c", "models--o--m/refs/x", False),
        ("models--o--m/snapshots/c", "models--o--other/blobs/x", False),
        ("home/snapshots/m", "home/.ssh/x", False),
        ("home/snapshots/m", "home/blobs/x", False),
    ],
)
def test_a_snapshot_links_into_the_blobs_of_its_own_cache(folder, target, fine, tmp_path):
    for path in (tmp_path / folder, (tmp_path / target).parent):
        path.mkdir(parents=True)
    (tmp_path / target).write_text("key")
    link = tmp_path / folder / "LICENSE"
    link.symlink_to(tmp_path / target)
    if fine:
        check_inside(link, link.parent)
        return
    with pytest.raises(UserError, match="outside of the source"):
        check_inside(link, link.parent)


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a link out"])
def test_further_chat_templates_are_regular_and_inside(kind, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "m")
    (folder / "additional_chat_templates").mkdir()
    make, said = KINDS[kind]
    make(folder / "additional_chat_templates" / "x.jinja")
    with pytest.raises(UserError, match=said):
        read_tokenizer(folder)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "a loop"])
@pytest.mark.parametrize("place", ["a folder", "a glob", "the file"])
def test_data_are_regular_files_inside_of_their_folder(kind, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "inner"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("text")
    make, said = KINDS[kind]
    make(folder / "b.txt")
    source = {"a folder": folder.parent, "a glob": folder.parent / "*" / "*.txt", "the file": folder / "b.txt"}[place]
    if (kind, place) == ("a link out", "the file"):
        assert files_of(str(source)) == [source]  # the user has named it
        return
    with pytest.raises(UserError, match=said):
        files_of(str(source))


NO_NAMES = ("..", ".", "", "a\0b")  # of a directory itself, of the one above, and of none


def test_a_saved_dataset_names_files_of_its_own(tmp_path):
    from datasets import Dataset

    from loopwise.train.data.tables import load_dataset

    folder = tmp_path / "saved"
    Dataset.from_list([{"text": "a"}]).save_to_disk(folder)
    assert len(load_dataset(str(folder), folder, "train", None)) == 1
    state = json.loads((folder / "state.json").read_text())
    for name in ("../theirs.arrow", *NO_NAMES):
        state["_data_files"] = [{"filename": name}]
        (folder / "state.json").write_text(json.dumps(state))
        with pytest.raises(UserError, match="files of a dataset lie in its directory"):
            load_dataset(str(folder), folder, "train", None)


def test_a_saved_dataset_has_splits_of_its_own(tmp_path):
    from datasets import Dataset, DatasetDict

    from loopwise.train.data.tables import load_dataset

    for name in ("saved", "theirs"):
        DatasetDict({"train": Dataset.from_list([{"text": name}])}).save_to_disk(tmp_path / name)
    folder = tmp_path / "saved"
    assert load_dataset(str(folder), folder, "train", None)["text"] == ["saved"]
    Dataset.from_list([{"text": "nobody has looked at it"}]).save_to_disk(tmp_path / "above")
    shutil.move(folder, tmp_path / "above" / "saved")
    folder = tmp_path / "above" / "saved"
    for name in ("../theirs/train", str(tmp_path / "theirs" / "train"), 7, *NO_NAMES):
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", name]}))
        with pytest.raises(UserError, match="splits of a dataset lie in its directory"):
            load_dataset(str(folder), folder, str(name), None)
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    shutil.rmtree(folder / "train")
    (folder / "train").symlink_to(tmp_path / "theirs" / "train")
    with pytest.raises(UserError, match="outside of the source"):
        load_dataset(str(folder), folder, "train", None)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}", "\udcff", "", "{", "NaN"]
)
def test_a_parser_s_error_is_one_line(text, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        read_json(file)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_files_and_directories_that_are_absent_pass(tmp_path):
    check_regular(tmp_path / "none")
    check_inside(tmp_path / "none", tmp_path)
    with pytest.raises(UserError, match="No such file"):
        check_entries(tmp_path / "none")


def test_every_text_file_has_an_encoding():
    """Reading and writing of text names UTF-8, whatever the locale."""
    bare = []
    for name in git("ls-files", "*.py"):
        if name.startswith(("tests/", "bench/")):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(key.arg == "encoding" for key in node.keywords):
                continue
            call = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            limit = {"read_text": 1, "write_text": 2}.get(call, 9)
            bytes_of = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args)
            of_files = call == "open" and ast.unparse(node.func) in ("open", "path.open", "file.open", "self.log.open")
            if (call in ("read_text", "write_text") and len(node.args) < limit) or (
                of_files and not bytes_of and not any(key.arg == "mode" for key in node.keywords)
            ):
                bare.append(f"{name}:{node.lineno}")
    assert bare == []


def test_a_terminal_without_a_character_ends_nothing(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# Größe █\nnum_hidden_layers: é\n", encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "loopwise", "init", "task:sums", str(tmp_path / "out"), "--recipe", str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"num_hidden_layers" in done.stderr


def test_output_beyond_the_terminal_s_characters(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert guarded(lambda argv: print("0.5 █") or 0, []) == 0
    assert (tmp_path / "out").read_text() == "0.5 ?\n"


TEMPLATES = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "large at once": "{{ 'x' * 40000000000 }}",
    "large by steps": "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_does_not_end_is_one_line(template, monkeypatch):
    from loopwise import bounded as limits
    from loopwise.train.data import chat

    monkeypatch.setattr(chat, "bounded", lambda name: limits.bounded(name, seconds=1, size=2**28))
    tokens = tokenizer()
    tokens.chat_template = TEMPLATES[template]
    conversation = chat.Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    start = time.monotonic()
    with pytest.raises(UserError, match=r"does not end within 1 s|needs more than 0\.25 GiB"):
        chat.encode(conversation, tokens, "text.jsonl:1")
    assert time.monotonic() - start < 5


def test_a_large_text_of_a_template_reaches_no_tokenizer(tmp_path):
    """For want of memory a tokenizer's own code aborts the process, so the texts are made in one of their own."""
    text = "{% for m in messages %}{{ m.content * 30000000 }}{% endfor %}"
    tokenizer().save_pretrained(tmp_path)
    program = (
        "from loopwise.load import read_tokenizer\nfrom loopwise.train.data import chat\n"
        "from loopwise.errors import UserError\n"
        f"tokens = read_tokenizer({str(tmp_path)!r})\n"
        "messages = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]\n"
        f"for template in ({text!r}, '{{% generation %}}' + {text!r} + '{{% endgeneration %}}'):\n"
        "    try: chat.encode(chat.Conversation(messages), tokens, 'here', template)\n"
        "    except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    said = "here: the chat template makes more than 16,777,216 characters of text\n"
    assert (done.returncode, done.stdout) == (0, said * 2), done.stderr[-500:]


def test_limits_are_lifted_afterwards():
    import resource
    import signal

    limit, handler = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with bounded("this"):
        assert resource.getrlimit(resource.RLIMIT_AS) != limit
    with pytest.raises(ValueError, match="mine"), bounded("this"):
        raise ValueError("mine")
    assert resource.getrlimit(resource.RLIMIT_AS) == limit
    assert signal.getsignal(signal.SIGALRM) == handler
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


RECORDS = ("[]", "{}", "x", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": [1, null]}}')


@pytest.mark.parametrize("record", RECORDS)
def test_a_checkpoint_with_a_broken_record_is_damaged(record, tmp_path):
    from loopwise.train.checkpoint import check_same_run, damage

    (tmp_path / "run.json").write_text(record)
    assert damage(tmp_path, thorough=True) == "no readable run.json"
    with pytest.raises(UserError, match=r"run\.json: "):
        check_same_run(tmp_path, {"recipe": {}})
