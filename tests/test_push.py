"""--push-to-hub of convert, train and export, against a stand-in for the hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from loopwise.card import copy_licences, metadata
from loopwise.cli import main
from loopwise.convert import command
from loopwise.recipe import validate
from loopwise.train.card import hub_datasets
from loopwise.train.recipe import Train
from tests.helpers.hub import READER, TOKEN, ask, environment, serving
from tests.helpers.hub_state import Hub, Repository, files_of
from tests.helpers.tiny import save_source

KEYS = ["sizes=1,3,2", "injection=none", "num_recurrences=3"]


@dataclass
class Place:
    """A hub, a source, and a finished OUT of `convert`, which `push` pushes."""

    hub: Hub
    source: Path
    out: Path

    def push(self, *options: object, name: str = "mine") -> int:
        """The exit code of the command that made OUT, with --push-to-hub."""
        return main(["convert", str(self.source), str(self.out), *KEYS, "--push-to-hub", name, *map(str, options)])

    def pushed(self, name: str = "me/mine") -> dict[str, bytes]:
        """The files in a repository, without the one that the hub puts there."""
        return {path: data for path, data in self.hub.models[name].files().items() if path != ".gitattributes"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A source with a card and a licence, and a finished OUT."""
    folder = tmp_path_factory.mktemp("push")
    source = save_source(folder / "source")
    card = "---\nlicense: other\nlicense_name: house\nlicense_link: LICENSE\nbase_model: them/base\n---\n# It\n"
    (source / "README.md").write_text(card)
    (source / "LICENSE").write_text("Do as you like.")
    assert main(["convert", str(source), str(folder / "out"), *KEYS]) == 0
    return folder


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "out", tmp_path / "out")
    with serving() as hub:
        ask(hub, tmp_path / "home", monkeypatch)
        yield Place(hub, finished / "source", tmp_path / "out")


def refused(capsys, place: Place, *options: object, name: str = "mine") -> str:
    """The one line of a push that is refused."""
    capsys.readouterr()
    assert place.push(*options, name=name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_convert_pushes_what_it_wrote(place, capsys):
    """Into a private repository in the user's own namespace, byte for byte, with its own model files."""
    shutil.rmtree(place.out)
    assert place.push() == 0
    printed = capsys.readouterr().out
    assert place.hub.created == [{"name": "mine", "organization": "me", "visibility": "private"}]
    assert place.pushed() == files_of(place.out)
    assert "modeling_recurrent_depth.py" in place.pushed()
    assert f"pushed: me/mine (private), revision {place.hub.models['me/mine'].refs['main']}\n" in printed
    card = ModelCard(place.pushed()["README.md"].decode()).data.to_dict()
    assert card == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["recurrent-depth", "loopwise"],
        "license": "other",
        "license_name": "house",
        "license_link": "LICENSE",
        "base_model": "them/base",
        "base_model_relation": "finetune",
    }


def test_the_same_command_again_makes_and_sends_nothing(place, capsys):
    assert place.push() == 0
    commits, before = len(place.hub.models["me/mine"].commits), (place.out / "loopwise.json").stat().st_mtime_ns
    place.hub.seen.clear()
    assert place.push() == 0
    assert "nothing is made again" in capsys.readouterr().out
    assert (place.out / "loopwise.json").stat().st_mtime_ns == before
    assert len(place.hub.models["me/mine"].commits) == commits
    assert not place.hub.asked("PUT", "large")


def test_another_start_of_tied_layers_is_another_model(place, capsys, tmp_path):
    """The record has an `init` in any case; the command has one only where it is asked for."""
    argv = ["convert", str(place.source), str(tmp_path / "tied"), "method=recursive", "loops=2"]
    assert main([*argv, "init=upper"]) == 0
    assert main([*argv, "--push-to-hub", "tied"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*argv, "init=upper", "--push-to-hub", "tied"]) == 0


SAID = {
    "recipe": "recipe.num_recurrences was 3, now 2",
    "weights": "source has other weights",
    "config": "config.json is newer",
    "missing": "files are missing that its record names",
}


@pytest.mark.parametrize("change", SAID)
def test_an_out_of_something_else_is_not_pushed(change, place, capsys, tmp_path):
    """Another recipe, changed weights or config of the source, a file that is gone."""
    source = shutil.copytree(place.source, tmp_path / "source")
    record = json.loads((place.out / "loopwise.json").read_text())
    record["source"]["id"] = str(source)
    (place.out / "loopwise.json").write_text(json.dumps(record))
    keys = list(KEYS)
    if change == "recipe":
        keys[-1] = "num_recurrences=2"
    elif change == "weights":
        other = save_source(tmp_path / "other", seed=9)  # the time of weights does not count: the hash alone tells
        shutil.copyfile(other / "model.safetensors", source / "model.safetensors")
    elif change == "config":
        late = time.time() + 10
        os.utime(source / "config.json", (late, late))
    else:
        (place.out / "tokenizer.json").unlink()
    assert main(["convert", str(source), str(place.out), *keys, "--push-to-hub", "mine"]) == 2
    assert f"{SAID[change]}; choose another directory, or replace it with --force" in capsys.readouterr().err
    assert place.hub.models == {}


def test_a_push_that_was_cut_off_sends_the_rest(place, capsys):
    place.hub.cut = 1
    assert "the same command uploads what is missing" in refused(capsys, place)
    assert place.pushed() == {}
    (sent,) = place.hub.large
    place.hub.cut = None
    place.hub.seen.clear()
    assert place.push() == 0
    assert place.pushed() == files_of(place.out)
    assert len(place.hub.large) == 2
    assert not place.hub.asked("PUT", sent)


@pytest.mark.parametrize(
    ("refuse", "said"),
    [
        (("POST", "repos/create", 403), "the token has no right to it: refused"),
        (("POST", "preupload", (403, "GatedRepo")), "it is gated: ask for access, and log in with `hf auth login`"),
        (("POST", "preupload", 404), "the hub has no such place"),
        (("POST", "commit", 409), "another change came in between"),
        (("POST", "commit", 401), "the hub refuses the token: log in with `hf auth login`"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(refuse, said, place, capsys):
    method, pattern, status = refuse
    place.hub.refuse[method, pattern] = status
    line = refused(capsys, place)
    assert said in line
    assert "OUT is whole" in line
    place.hub.refuse.clear()
    assert place.push() == 0
    assert place.pushed() == files_of(place.out)


def test_a_card_that_the_hub_refuses_is_named(place, capsys):
    place.hub.refuse["POST", "validate-yaml"] = 400
    assert f"OUT is whole: mend the metadata at the top of {place.out / 'README.md'}, then" in refused(capsys, place)


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_is_not_a_missing_one(status, place, capsys):
    place.hub.models["me/mine"] = Repository(private=True)
    place.hub.refuse["GET", "api/models/me/mine"] = status, "GatedRepo"
    line = refused(capsys, place)
    assert line == "loopwise: error: --push-to-hub mine: it is gated: ask for access, and log in with `hf auth login`"
    assert not place.hub.asked("POST", "")


@pytest.mark.parametrize("moment", ["published", "made", "by rule"])
def test_nothing_goes_to_a_repository_that_is_public_by_now(moment, place, capsys, monkeypatch):
    """Somebody publishes or makes it while the model is made, or the hub makes every repository public."""
    if moment == "published":
        place.hub.models["me/mine"] = Repository(private=True)
        place.hub.models["me/mine"].commit({"notes.txt": b"mine"})
    place.hub.all_public = moment == "by rule"

    def meanwhile(*_: object) -> bool:
        if moment == "made":
            place.hub.models["me/mine"] = Repository()
            place.hub.models["me/mine"].commit({})
        elif moment == "published":
            place.hub.models["me/mine"].private = False
        return True

    monkeypatch.setattr(command, "_is_done", meanwhile)
    assert "me/mine is public already; give --public to push there" in refused(capsys, place)
    assert not {*place.pushed()} - {"notes.txt"}
    assert not place.hub.large


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("mine", None, "it needs a token: log in with `hf auth login`, or set HF_TOKEN"),
        ("mine", "hf_other", "the hub refuses the token"),
        ("mine", READER, "the token can only read"),
        ("a/b/c", None, "NAME or OWNER/NAME"),
        ("-mine", None, "NAME or OWNER/NAME"),
        ("them/mine", TOKEN, "the token may not write there; as owner give me or we"),
    ],
)
@pytest.mark.parametrize("verb", ["convert", "export", "train"])
def test_nothing_is_done_without_a_name_and_a_token(verb, name, token, said, place, capsys, monkeypatch, tmp_path):
    ask(place.hub, tmp_path / "home", monkeypatch, token)
    rest = {"convert": KEYS, "export": ["--unroll", "2"], "train": ["data.train=text.txt"]}[verb]
    assert main([verb, "none", str(tmp_path / "new"), *rest, f"--push-to-hub={name}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert place.hub.models == {}
    assert not (tmp_path / "new").exists()


def test_without_a_network_nothing_begins(place, capsys, monkeypatch, tmp_path):
    from huggingface_hub import constants

    ask(Hub(url="http://127.0.0.1:9"), tmp_path / "home", monkeypatch)
    assert "the hub cannot be reached" in refused(capsys, place)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "the hub is not asked offline" in refused(capsys, place)


def test_a_repository_with_files_of_others(place, capsys):
    """They stay; a model of others is refused; so is a public repository without --public."""
    theirs = {"notes.txt": b"mine", "README.md": b"# Mine", "images/a.png": b"png"}
    place.hub.models["me/mine"] = Repository(private=True)
    place.hub.models["me/mine"].commit(theirs)
    assert place.push() == 0
    assert place.pushed() == {**theirs, **files_of(place.out)}
    place.hub.models["me/theirs"] = Repository(private=True)
    place.hub.models["me/theirs"].commit({"config.json": b"{}", "model.safetensors": b""})
    assert "a model that Loopwise did not push (config.json)" in refused(capsys, place, name="me/theirs")
    place.hub.models["me/open"] = Repository()
    place.hub.models["me/open"].commit({"notes.txt": b"mine"})
    assert "me/open is public already; give --public" in refused(capsys, place, name="me/open")
    assert [len(place.hub.models[name].commits) for name in ("me/theirs", "me/open")] == [1, 1]
    assert place.push(name="we/ours") == 0  # of an organisation
    assert place.push("--public", name="me/open") == 0
    assert place.pushed("me/open") == {"notes.txt": b"mine", **files_of(place.out)}


def test_files_of_an_earlier_push_do_not_stay_beside_the_new(place):
    """Shards of before would be loaded in place of the new weights."""
    before = {"loopwise.json": b'{"files": ["model-00001-of-00001.safetensors"]}', "notes.txt": b"mine"}
    place.hub.models["me/mine"] = Repository(private=True)
    place.hub.models["me/mine"].commit({**before, "model-00001-of-00001.safetensors": b"old"})
    assert place.push() == 0
    assert place.pushed() == {"notes.txt": b"mine", **files_of(place.out)}


def test_code_that_is_not_loopwises_own_is_not_pushed(place, capsys):
    with (place.out / "router.py").open("a") as file:
        file.write("import os\n")
    assert "router.py is not the code that Loopwise wrote" in refused(capsys, place)
    assert place.hub.models == {}


@pytest.mark.parametrize("change", ["cut", "cut, of an earlier release", "another value"])
def test_weights_that_are_not_as_they_were_written_are_not_pushed(change, place, capsys):
    """A card that calls them verified would go with them."""
    file, record = place.out / "model.safetensors", json.loads((place.out / "loopwise.json").read_text())
    data = file.read_bytes()
    file.write_bytes(data[:-4] + bytes(4) if change == "another value" else data[:100])
    if "earlier" in change:
        del record["weights"]
        (place.out / "loopwise.json").write_text(json.dumps(record))
    assert re.search(r"model\.safetensors(: truncated| (in it )?is not as )", refused(capsys, place))
    assert place.hub.models == {}


def test_a_dry_run_names_the_place_and_pushes_nothing(place, capsys, tmp_path):
    argv = ["convert", str(place.source), str(tmp_path / "new"), *KEYS, "--dry-run", "--push-to-hub", "me/mine"]
    assert main([*argv, "--public"]) == 0
    assert capsys.readouterr().out.endswith("would be pushed: me/mine (public)\n")
    assert place.hub.models == {}


def test_results_become_the_model_index(place, capsys, monkeypatch, tmp_path):
    """As huggingface_hub reads it; results of another model, or of an older OUT, are refused. Measured elsewhere."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    keys = ["data=data/text.txt", "sequence_length=32", "num_recurrences=1,3"]
    result, other = tmp_path / "result.json", tmp_path / "other.json"
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "out", *keys, "--out", str(result)]) == 0
    monkeypatch.chdir(tmp_path / "data")
    task = {"task": "gsm8k", "num_recurrences": 3, "baseline": False, "metric": "exact_match,strict", "score": 0.25}
    tasks = {"model": str(place.out), "results": [{**task, "baseline": True}, task]}
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    assert place.push("--metrics", result, "--metrics", tmp_path / "tasks.json", "--public") == 0
    assert place.hub.created[0]["visibility"] == "public"
    data: Any = ModelCard(place.pushed()["README.md"].decode()).data
    assert data.model_name == "mine"
    found = {
        (one.dataset_name, one.metric_type, one.metric_args["num_recurrences"]): one.metric_value
        for one in data.eval_results
    }
    rows = json.loads(result.read_text())["results"]
    want = {("text.txt", kind, row["num_recurrences"]): row[kind] for row in rows for kind in ("loss", "perplexity")}
    assert found == {**want, ("gsm8k", "exact_match", 3): 0.25}
    assert data.license == "other"
    capsys.readouterr()
    other.write_text(json.dumps({**json.loads(result.read_text()), "model": "them/model", "model_path": None}))
    assert "it measured them/model" in refused(capsys, place, "--metrics", other, "--public")
    os.utime(result, (1e9, 1e9))
    assert "it measured another" in refused(capsys, place, "--metrics", result, "--public")
    other.write_text("{}")
    assert "not a result of loopwise eval" in refused(capsys, place, "--metrics", other, "--public")
    assert main(["convert", "none", "out", *KEYS, "--public"]) == 2
    assert "--public belongs to --push-to-hub NAME" in capsys.readouterr().err


def test_export_pushes_a_plain_model(place, capsys, tmp_path):
    """A hub id is the base model; its licence and name pass on."""
    assert place.push() == 0
    argv = ["export", "me/mine", str(tmp_path / "plain"), "--unroll", "2", "--push-to-hub", "plain"]
    commit = place.hub.models["me/mine"].refs["main"]
    for said in ("written: ", "nothing is made again"):
        assert main(argv) == 0
        assert said in capsys.readouterr().out
        assert place.pushed("me/plain") == files_of(tmp_path / "plain")
    card = ModelCard(place.pushed("me/plain")["README.md"].decode()).data.to_dict()
    named = ("license", "license_name", "license_link", "base_model", "base_model_relation")
    assert [card[name] for name in named] == ["other", "house", "LICENSE", "me/mine", "finetune"]
    assert place.pushed("me/plain")["LICENSE"] == b"Do as you like."
    assert main([*argv[:4], "3", *argv[5:]]) == 2
    assert "unroll was 2, now 3" in capsys.readouterr().err
    moved = place.hub.models["me/mine"].commit({**place.hub.models["me/mine"].files(), "notes.txt": b"mine"})
    assert main(argv) == 2
    assert f"me/mine was at commit {commit}, now {moved} (as revision, the first keeps it)" in capsys.readouterr().err
    assert main([*argv, "--revision", commit]) == 0


@pytest.mark.parametrize("verb", ["convert", "export", "train"])
def test_a_source_is_not_replaced_by_what_is_made_of_it(verb, place, capsys, tmp_path):
    """Loopwise pushed it, so it may be replaced, but not by a model that names it as its base."""
    before = place.hub.add("me/mine", place.out)
    rest = {"convert": KEYS, "export": ["--unroll", "2"], "train": ["data.train=text.txt", "steps=1"]}[verb]
    for name in ("mine", "Me/Mine"):
        assert main([verb, "me/mine", str(tmp_path / "new"), *rest, "--push-to-hub", name]) == 2
        assert "me/mine is the source itself, which the push would replace" in capsys.readouterr().err.replace("M", "m")
    assert place.hub.models["me/mine"].refs["main"] == before
    assert not (tmp_path / "new").exists()


def test_train_pushes_the_model_of_a_finished_run(place, capsys, tmp_path, monkeypatch):
    from loopwise.train import run

    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    keys = [f"data.train={tmp_path / 'text.txt'}", "data.sequence_length=32", "recurrence.mean=2", "save_every=1"]
    keys += ["data.eval=task:parity?records=4"]
    argv = ["train", str(place.out), str(tmp_path / "run"), *keys, "steps=1", "--push-to-hub", "trained"]
    with monkeypatch.context() as patch:
        patch.setattr(run, "train", lambda *_: None)  # as one that SIGTERM ends
        assert main(argv) == 0
    assert "not pushed to me/trained" in capsys.readouterr().out
    assert place.hub.models == {}
    for said in ("model written", "already finished"):
        assert main(argv) == 0
        assert said in capsys.readouterr().out
        written = json.loads((tmp_path / "run" / "loopwise.json").read_text())["files"]
        files = {path: data for path, data in files_of(tmp_path / "run").items() if path in {*written, "loopwise.json"}}
        assert place.pushed("me/trained") == files
    assert not any(path.startswith("checkpoint") for path in files)
    card = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (card["license_name"], card["base_model"], card["pipeline_tag"]) == ("house", "them/base", "text-generation")
    monkeypatch.chdir(tmp_path)
    assert main([*argv, "data.train=text.txt"]) == 0
    late = time.time() + 10
    for change, said in {
        "seed=2": "seed was 0, now 2",
        "dtype=bfloat16": "run is the finished run of other settings (dtype was None, now 'bfloat16'): give the same",
        "data.sequence_length=16": "sequence_length was 32, now 16",
        "steps=1": "text.txt is newer than the finished run in ",
    }.items():
        if change == "steps=1":
            os.utime(tmp_path / "text.txt", (late, late))
        assert main([*argv, change]) == 2
        assert said in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0


def test_datasets_of_a_card_are_ids_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    sources = ["them/text", "local", "text.jsonl", "./data/*.txt", "task:hops?hops=1..2", "wikitext"]
    (tmp_path / "text.jsonl").write_text("")
    phases = [{"share": 1, "sources": dict.fromkeys(sources, 1)}]
    recipe = validate(Train, {"data": {"phases": phases}, "steps": 1})
    assert hub_datasets(recipe) == ["them/text", "wikitext"]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"README.md": "---\nlicense: mit\n---\n"}, {"license": "mit"}),
        (
            {"LICENSE": "Apache License\n  Version 2.0, January 2004"},
            {"license": "apache-2.0", "license_link": "LICENSE"},
        ),
        ({"LICENCE.txt": "All rights reserved"}, {"license": "other", "license_link": "LICENCE.txt"}),
        ({"README.md": "---\n[: no yaml\n---\n"}, {}),
        ({"README.md": "---\nlicense: other\nlicense_link: TERMS\n---\n"}, {"license": "other"}),
        ({"README.md": "---\nlicense: [mit, apache-2.0, mit]\n---\n"}, {"license": ["mit", "apache-2.0"]}),
        ({"README.md": "---\nlicense:\n- mit\n---\n"}, {"license": "mit"}),
        (
            {
                "README.md": "---\nlicense: [mit, other]\nlicense_name: house\nlicense_link: docs/LICENSE.md\n---\n",
                "LICENSE.md": "Do as you like.",
            },
            {"license": ["mit", "other"], "license_name": "house", "license_link": "LICENSE.md"},
        ),
        (
            {"README.md": "---\nlicense: other\nlicense_name: house\n---\n", "LICENSE": "Do as you like."},
            {"license": "other", "license_name": "house", "license_link": "LICENSE"},
        ),
        (
            {"README.md": "---\nbase_model: [a/x, b/y]\ndatasets: a/text\n---\n"},
            {"base_model": ["a/x", "b/y"], "base_model_relation": "merge", "datasets": ["a/text", "c/text"]},
        ),
        (  # the hub refuses what is no id
            {"README.md": "---\nbase_model: [a/x, '', /home/me/ckpt, a/b/c, 7]\ndatasets: ['./d', a/text]\n---\n"},
            {"base_model": "a/x", "base_model_relation": "finetune", "datasets": ["a/text", "c/text"]},
        ),
        ({"README.md": "---\nbase_model: ../ckpt\nlicense: ''\n---\n"}, {}),
        ({"README.md": "---\nlicense: Apache 2.0\n---\n"}, {"license": "apache-2.0"}),
        (
            {"README.md": "---\nlicense: [mit, House Rules!]\n---\n", "LICENSE": "Do as you like."},
            {"license": ["mit", "other"], "license_name": "house-rules", "license_link": "LICENSE"},
        ),
        ({}, {}),
    ],
)
def test_metadata_of_a_local_source(files, found, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    rest = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["loopwise"]}
    more = ["c/text"] if "datasets" in found else []
    assert metadata(str(tmp_path), tmp_path, tmp_path, ["loopwise"], more) == {**rest, **found}


def test_a_link_to_a_licence_leads_to_its_text(tmp_path):
    """It is carried where it is a text of the source's; else the link is to the source's repository, if it has one."""
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "docs").mkdir(parents=True)
    out.mkdir()
    (source / "docs/TERMS.md").write_text("Do as you like.")
    (source / "config.json").write_text("{}")
    (tmp_path / "outside.txt").write_text("precious")
    for link, local in {"docs/TERMS.md": "TERMS.md", "config.json": None, "../outside.txt": None}.items():
        (source / "README.md").write_text(f"---\nlicense: other\nlicense_link: {link}\n---\n")
        copy_licences(source, out)
        assert metadata(str(source), source, out, []).get("license_link") == local
        there = metadata("them/model", source, out, [])["license_link"]
        assert there == local or there.endswith(f"/them/model/blob/main/{link}")
    assert files_of(out) == {"TERMS.md": b"Do as you like."}


@pytest.mark.slow
def test_a_killed_push_goes_on(place, capsys, tmp_path):
    """SIGKILL in the middle of an upload: the same command sends the rest, and converts nothing again."""
    shutil.rmtree(place.out)
    place.hub.cut, place.hub.held = 1, threading.Event()
    argv = ["convert", str(place.source), str(place.out), *KEYS, "--push-to-hub", "mine"]
    env = {**os.environ, **environment(place.hub, tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([sys.executable, "-m", "loopwise", *argv], env=env)
    end = time.monotonic() + 300
    while len(place.hub.large) < 1 or place.hub.asked("PUT", "large") < 2:
        assert time.monotonic() < end
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGKILL)
    running.wait()
    place.hub.held.set()
    assert place.pushed() == {}
    before, (sent,) = (place.out / "loopwise.json").stat().st_mtime_ns, place.hub.large
    place.hub.cut = None
    place.hub.seen.clear()
    assert place.push() == 0
    assert "nothing is made again" in capsys.readouterr().out
    assert (place.out / "loopwise.json").stat().st_mtime_ns == before
    assert not place.hub.asked("PUT", sent)
    assert place.pushed() == files_of(place.out)
