"""Every verb that takes a model takes a hub id at a revision, and gives what it gives for the same files here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loopwise.cli import main
from tests.helpers.blocked import without
from tests.helpers.hub import ask, environment, serving
from tests.helpers.hub_state import Hub, files_of
from tests.helpers.tiny import save_source

KEYS = ["sizes=1,3,2", "injection=none", "num_recurrences=3"]


@dataclass
class World:
    """A hub with the model me/model. Its first commit is the directory `old`, main the directory `new`."""

    hub: Hub
    folder: Path
    first: str

    @property
    def old(self) -> Path:
        return self.folder / "old"

    @property
    def new(self) -> Path:
        return self.folder / "new"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        ask(hub, folder / "home", patch)
        for seed, name in enumerate(("old", "new")):
            save_source(folder / f"source-{name}", seed=seed)
            assert main(["convert", str(folder / f"source-{name}"), str(folder / name), *KEYS, "--no-verify"]) == 0
        first = hub.add("me/model", folder / "old")
        hub.add("me/model", folder / "new")
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
        yield World(hub, folder, first)


def run(capsys, *argv: object) -> str:
    """The output of a command, which succeeds."""
    assert main([*map(str, argv)]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv: object) -> str:
    """The one line of a command that refuses."""
    capsys.readouterr()
    assert main([*map(str, argv)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("revision", ["branch", "commit"])
def test_convert_takes_a_branch_and_a_commit(revision, world, tmp_path):
    folder = world.folder / f"source-{revision}"
    commits = [world.hub.add(f"them/{revision}", save_source(folder, seed=seed), f"v{seed}") for seed in (2, 3)]
    asked = "v2" if revision == "branch" else commits[0]
    (folder / "evil.py").write_text("raise SystemExit(9)")
    assert main(["convert", f"them/{revision}", str(tmp_path / "out"), *KEYS, f"revision={asked}"]) == 0
    save_source(folder, seed=2)
    assert main(["convert", str(folder), str(tmp_path / "local"), *KEYS]) == 0
    record = json.loads((tmp_path / "out" / "loopwise.json").read_text())
    assert record["source"]["revision"] == commits[0]
    assert files_of(tmp_path / "out").keys() == files_of(tmp_path / "local").keys()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def both(world: World) -> list[tuple[str, list[str], list[str], Path]]:
    """(id, options, keys, the directory with the same files), for main and for the first commit."""
    at = world.first
    return [("me/model", [], [], world.new), ("me/model", ["--revision", at], [f"revision={at}"], world.old)]


def test_inspect_downloads_no_weights(world, capsys):
    world.hub.seen.clear()
    for model, options, _, folder in both(world):
        found, want = (json.loads(run(capsys, "inspect", *a, "--json")) for a in ([model, *options], [folder]))
        assert {**found, "model": 0} == {**want, "model": 0}
    assert not world.hub.asked("GET", r"resolve.*safetensors")


def test_generate(world, capsys):
    keys = ["prompt=fox", "temperature=0", "max_tokens=5", "details=true"]
    texts = []
    for model, _, revision, folder in both(world):
        texts.append(run(capsys, "generate", model, *keys, *revision))
        assert texts[-1] == run(capsys, "generate", folder, *keys)
    assert texts[0] != texts[1]
    assert not world.hub.asked("GET", r"resolve.*\.py")


def test_eval(world, capsys):
    keys = [f"data={world.folder / 'text.txt'}", "sequence_length=32", "num_recurrences=1,3", "--json"]
    for model, _, revision, folder in both(world)[1:]:
        found, want = (json.loads(run(capsys, "eval", *a, *keys)) for a in ([model, *revision], [folder]))
        assert (found["model_path"], want["model_path"]) == (None, str(folder))
        assert {**found, "model": 0, "model_path": 0} == {**want, "model": 0, "model_path": 0}


def test_a_baseline_has_a_revision_of_its_own(world, capsys, tmp_path):
    commit = world.hub.add("them/base", world.folder / "source-old", "v1")
    main_commit = world.hub.add("them/base", world.folder / "source-new")
    (tmp_path / "task.jsonl").write_text('{"question": "The quick brown", "answer": "fox"}\n')
    argv = ["eval", "me/model", f"tasks={tmp_path / 'task.jsonl'}", "gen_kwargs.max_gen_toks=2", "baseline=them/base"]
    assert "them/base: no such directory, and no model of the hub at revision 'v9'" in refused(
        capsys, *argv, "baseline_revision=v9"
    )
    world.hub.seen.clear()
    found = json.loads(run(capsys, *argv, "baseline_revision=v1", "--json"))
    assert found["models"]["them/base"] == commit
    assert world.hub.asked("HEAD", f"them/base/resolve/{commit}/model.safetensors")
    assert not world.hub.asked("HEAD", f"them/base/resolve/(main|{main_commit})/")
    argv[1:2] = ["them/base", "revision=v1"]
    assert "baseline=them/base is MODEL itself" in refused(capsys, *argv)


def test_export(world, capsys, tmp_path):
    for number, (model, options, _, folder) in enumerate(both(world)):
        hub, local = tmp_path / f"hub-{number}", tmp_path / f"local-{number}"
        run(capsys, "export", model, hub, "--unroll", 2, *options)
        run(capsys, "export", folder, local, "--unroll", 2)
        assert (hub / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()
        source = json.loads((hub / "loopwise.json").read_text())["source"]
        assert (source["id"], source["revision"]) == (
            model,
            options[-1] if options else world.hub.models[model].refs["main"],
        )


def test_calibrate(world, capsys, tmp_path):
    keys = [f"data={world.folder / 'text.txt'}", "rule=cosine", "sequence_length=32", "limit=4", "budget=9"]
    for number, (model, _, revision, folder) in enumerate(both(world)[1:]):
        hub, local = tmp_path / f"hub-{number}", tmp_path / f"local-{number}"
        run(capsys, "calibrate", model, hub, *keys, *revision)
        run(capsys, "calibrate", folder, local, *keys)
        assert (hub / "config.json").read_bytes() == (local / "config.json").read_bytes()
        assert (hub / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        assert json.loads((hub / "loopwise.json").read_text())["calibrated"]["from"] == "me/model"


def test_plot(world, monkeypatch, tmp_path):
    from loopwise.evaluation.plot import command

    drawn: list[Any] = []
    monkeypatch.setattr(command, "_save", lambda picture, file: drawn.append(picture))
    for model, _, revision, folder in both(world)[1:]:
        for argv in ([model, *revision], [str(folder)]):
            assert main(["plot", "text", *argv, "text=lazy dog", "--out", str(tmp_path / "x.html")]) == 0
        assert drawn[-2].replace("model", "") == drawn[-1].replace(folder.name, "").replace("model", "")


def test_train(world, capsys, tmp_path):
    keys = [f"data.train={world.folder / 'text.txt'}", "data.sequence_length=32", "steps=1", "recurrence.mean=2"]
    for number, (model, _, revision, folder) in enumerate(both(world)[1:]):
        hub, local = tmp_path / f"hub-{number}", tmp_path / f"local-{number}"
        run(capsys, "train", model, hub, *keys, *revision)
        run(capsys, "train", folder, local, *keys)
        found, want = (load_file(out / "model.safetensors") for out in (hub, local))
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)
        found, want = (json.loads((out / "loopwise.json").read_text())["source"] for out in (hub, local))
        assert found == {"id": model, "revision": world.first, "facts": want["facts"]}


def test_search(world, capsys):
    """A plain model, the source, by its id."""
    commit = world.hub.add("them/plain", world.folder / "source-old")
    world.hub.add("them/plain", world.folder / "source-new")
    keys = [f"data={world.folder / 'text.txt'}", "sequence_length=32", "limit=2", "sizes=2", "ways=skip", "--json"]
    found = json.loads(run(capsys, "search", "them/plain", f"revision={commit}", *keys))
    want = json.loads(run(capsys, "search", world.folder / "source-old", *keys))
    assert found["source"] == want["source"]
    assert found["programs"] == want["programs"]


def test_serve_loads_the_snapshot_and_goes_by_the_id(world, monkeypatch):
    from loopwise.serve import server

    given: list[Any] = []
    monkeypatch.setattr(server, "find_spec", lambda name: True)
    monkeypatch.setattr(server, "_claim_port", lambda host, port: None)
    monkeypatch.setattr(server, "parse_arguments", lambda *a: given.append(a) or (None, {}, []))
    monkeypatch.setattr(server, "run_server", lambda *a: 0)
    assert main(["serve", "me/model", f"revision={world.first}"]) == 0
    model, _, recipe, _ = given[0]
    assert (Path(model).name, recipe.name) == (world.first, "me/model")
    assert (Path(model) / "model.safetensors").read_bytes() == (world.old / "model.safetensors").read_bytes()


LINES = [  # command without the model, and the option or key of a revision
    ("inspect", [], "--revision"),
    ("export", ["OUT", "--unroll", "2"], "--revision"),
    ("generate", ["prompt=x"], "revision="),
    ("serve", [], "revision="),
    ("calibrate", ["OUT", "data=TEXT", "rule=kl"], "revision="),
    ("eval", ["data=TEXT"], "revision="),
    ("search", ["data=TEXT"], "revision="),
    ("train", ["OUT", "data.train=TEXT", "steps=1"], "revision="),
    ("convert", ["OUT", *KEYS], "revision="),
]


@pytest.mark.parametrize(("verb", "rest", "option"), LINES, ids=[line[0] for line in LINES])
def test_what_the_hub_does_not_give_is_told_in_one_line(verb, rest, option, world, capsys, tmp_path, monkeypatch):
    """No such model, no such revision, a revision of a directory, no network, offline."""
    from huggingface_hub import constants

    names = {"OUT": tmp_path / "out", "data=TEXT": f"data={world.folder / 'text.txt'}"}
    names["data.train=TEXT"] = f"data.train={world.folder / 'text.txt'}"
    rest = [str(names.get(word, word)) for word in rest]
    at = ["--revision", "v9"] if option.startswith("--") else ["revision=v9"]
    id = "them/plain" if verb in ("search", "convert") else "me/model"
    world.hub.add("them/plain", world.folder / "source-old")
    assert "the hub has none of this name" in refused(capsys, verb, "me/nothing", *rest)
    assert "at revision 'v9' (the hub has no such revision of it)" in refused(capsys, verb, id, *rest, *at)
    assert "revision='v9' is for hub" in refused(capsys, verb, world.old, *rest, *at)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with monkeypatch.context() as patch:
        ask(Hub(url="http://127.0.0.1:9"), tmp_path / "empty", patch)
        assert "the hub cannot be reached" in refused(capsys, verb, id, *rest)
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert "the hub is not asked offline" in refused(capsys, verb, id, *rest)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["inspect", "generate", "serve"])
def test_a_plain_model_of_the_hub_is_refused_before_its_weights(verb, world, capsys):
    world.hub.add("them/plain", world.folder / "source-old")
    world.hub.seen.clear()
    assert "model_type is 'llama'" in refused(capsys, verb, "them/plain", *(["prompt=x"] if verb == "generate" else []))
    assert not world.hub.asked("GET", r"resolve.*safetensors")


STRANGER = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/model", revision=sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    save_file({"logits": model(torch.arange(3, 20)[None], num_recurrences=3, use_cache=False).logits}, sys.argv[2])
"""


@pytest.mark.parametrize("verb", ["eval", "train", "teacher"])
def test_no_more_layers_are_made_than_a_plain_model_has(verb, world, capsys, tmp_path):
    """The files of a hub id are looked at as those of a directory."""
    folder = save_source(tmp_path / "source")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 1000, "layer_types": None}))
    world.hub.add("them/layers", folder)
    text = world.folder / "text.txt"
    argv = ["eval", "them/layers", f"data={text}", "sequence_length=32"]
    if verb != "eval":
        model = "me/model" if verb == "teacher" else "them/layers"
        argv = ["train", model, tmp_path / "out", f"data.train={text}", "data.sequence_length=32", "steps=1"]
        argv += ["objectives.distillation.teacher=them/layers"] * (verb == "teacher")
    start = time.monotonic()
    assert refused(capsys, *argv).endswith("them/layers: config.json has 1000 layers, and the weights have 6")
    assert time.monotonic() - start < 10
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_plain_transformers_loads_what_was_pushed(world, tmp_path):
    """In a process that cannot import loopwise, from the hub alone."""
    from transformers import AutoModelForCausalLM

    env = {**os.environ, **environment(world.hub, tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-I", "-c", without("loopwise", STRANGER), world.first, str(tmp_path / "logits")]
    done = subprocess.run(program, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(world.old).eval()
    with torch.no_grad():
        want = model(torch.arange(3, 20)[None], num_recurrences=3, use_cache=False).logits
    assert torch.equal(load_file(tmp_path / "logits")["logits"], want)
