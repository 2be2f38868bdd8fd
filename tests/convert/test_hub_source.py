"""A source on the hub: what is downloaded, and when."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loopwise.cli import main
from loopwise.convert import ConvertRecipe, convert
from loopwise.convert.handle import HubFile
from loopwise.find_source import find_source
from loopwise.recipe import validate
from tests.helpers.convert import refused, shard
from tests.helpers.hub import ask, serving
from tests.helpers.hub_state import Hub, Repository, files_of
from tests.helpers.tiny import save_source

KEYS = ["sizes=1,3,2", "injection=none"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A checkpoint in shards, with weights of other forms beside them, in files and in a folder."""
    folder = save_source(tmp_path_factory.mktemp("hub") / "source")
    weights = (folder / "model.safetensors").read_bytes()
    shard(folder, load_file(folder / "model.safetensors"), 3)
    (folder / "original").mkdir()
    for name in ("consolidated.safetensors", "original/model.safetensors", "original/params.json"):
        (folder / name).write_bytes(weights)
    return folder


@pytest.fixture
def hub(source, tmp_path_factory, monkeypatch):
    with serving() as hub:
        ask(hub, tmp_path_factory.mktemp("home"), monkeypatch)
        hub.add("them/base", source)
        yield hub


def weights(hub: Hub, whole: bool) -> list[str]:
    """The weight files that were downloaded, whole or in parts."""
    return sorted({name for name, _, all_of_it in hub.sent if name.endswith(".safetensors") and all_of_it == whole})


def downloaded(hub: Hub) -> int:
    """The bytes of weight files that were downloaded."""
    return sum(size for name, size, _ in hub.sent if name.endswith(".safetensors"))


HEADERS = 20_000  # bytes that are more than the headers, and less than an embedding or a layer
SHARDS = [f"model-{n}-of-00003.safetensors" for n in ("00001", "00002", "00003")]


@pytest.mark.parametrize(
    "keys",
    [{"sizes": [1, 3, 2]}, {"method": "recursive", "loops": 2, "lora": {"rank": 2}}],
    ids=["retrofit", "lora"],
)
def test_a_dry_run_leaves_the_weights_there(keys, hub, source, tmp_path):
    """And its plan is that of the same files here, but for the search for layers that repeat."""
    found, want = (
        convert(each, tmp_path / "out", validate(ConvertRecipe, keys), dry_run=True) for each in ("them/base", source)
    )
    assert {**found, "source": 0, "notes": 0} == {**want, "source": 0, "notes": 0}
    assert [note for note in found["notes"] if note not in want["notes"]] == [
        "the weights stay on the hub: headers are read, and the few values that the plan needs, and layers that repeat "
        "are not looked for"
    ]
    assert weights(hub, whole=True) == []
    assert weights(hub, whole=False)


def test_a_conversion_downloads_what_the_index_names(hub, source, tmp_path):
    assert main(["convert", "them/base", str(tmp_path / "hub"), *KEYS]) == 0
    assert weights(hub, whole=True) == SHARDS
    assert not [name for name, *_ in hub.sent if "/" in name]
    assert main(["convert", str(source), str(tmp_path / "here"), *KEYS]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_the_cache_is_enough_offline(hub, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    assert main(["convert", "them/base", str(tmp_path / "plan"), *KEYS, "--dry-run"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HUB_OFFLINE", "1")
        capsys.readouterr()
        assert "(the hub is not asked offline)" in refused(capsys, tmp_path, "them/base", tmp_path / "out", *KEYS)
    assert main(["convert", "them/base", str(tmp_path / "online"), *KEYS, "--no-verify"]) == 0
    hub.seen.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["convert", "them/base", str(tmp_path / "offline"), *KEYS, "--dry-run"]) == 0
    assert main(["convert", "them/base", str(tmp_path / "offline"), *KEYS, "--no-verify"]) == 0
    assert hub.seen == []


@pytest.mark.parametrize(
    ("change", "keys", "line"),
    [
        ({"model_type": "mamba"}, KEYS, "architecture 'mamba' is not supported yet: "),
        (
            {"model_type": "hrm_text"},
            [],
            "them/changed is a recurrent model already (HRM-Text), and cannot be imported",
        ),
        ({"model_type": "recurrent_depth"}, KEYS, "them/changed is a recurrent-depth model already"),
        ({"model_type": "new", "auto_map": {"AutoConfig": "x.Y"}}, KEYS, "them/changed (new) needs remote code, which"),
        ({"quantization_config": {"quant_method": "fp8"}}, KEYS, "them/changed is quantised (fp8): dequantize=true"),
        ({"quantization_config": {"quant_method": "fp8"}}, ["method=fold"], "them/changed is quantised (fp8): "),
        ({}, ["sizes=9,9,9"], "sizes=9,9,9 need 27 layers; the source has 6"),
        ({}, [], "them/changed (llama) is no recurrent checkpoint that could be imported"),
        ({"hidden_size": 96}, KEYS, "by the config it has"),
    ],
)
def test_what_is_refused_is_not_downloaded(change, keys, line, hub, source, capsys, tmp_path):
    """The line is that of a directory, with the id in place of its path."""
    files = files_of(source)
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **change}).encode()
    hub.models["them/changed"] = Repository()
    hub.models["them/changed"].commit(files)
    assert line in refused(capsys, tmp_path, "them/changed", tmp_path / "out", *keys)
    assert weights(hub, whole=True) == []
    assert downloaded(hub) < HEADERS


def test_a_plan_compares_no_tied_tensors_there(hub, source, tmp_path):
    """An embedding and a head, which the files hold both."""
    state = {name: tensor for file in SHARDS for name, tensor in load_file(source / file).items()}
    embedding = state["model.embed_tokens.weight"]
    made = tmp_path / "tied"
    made.mkdir()
    save_file({**state, "lm_head.weight": embedding.clone()}, made / "model.safetensors", {"format": "pt"})
    fields = json.loads((source / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    hub.add("them/tied", made)
    facts = convert("them/tied", tmp_path / "out", validate(ConvertRecipe, {"sizes": [1, 3, 2]}), dry_run=True)
    assert facts["parameters"]["source"] == sum(tensor.numel() for tensor in state.values()) - embedding.numel()
    assert downloaded(hub) < HEADERS


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (["pytorch_model.bin"], "them/few/pytorch_model.bin: pickled weights can run code and are not read"),
        (["original/model.safetensors"], "them/few has a config but no weights (model.safetensors or "),
        (["model.safetensors.index.json"], "them/few/model-00001-of-00003.safetensors: missing, though "),
        (["x.Q4_0.gguf"], "them/few holds GGUF files; name the one to take: them/few:x.Q4_0.gguf"),
    ],
)
def test_a_repository_without_weights_is_named(files, line, hub, source, capsys, tmp_path):
    known = files_of(source)
    hub.models["them/few"] = Repository()
    hub.models["them/few"].commit(
        {"config.json": known["config.json"], **{name: known.get(name, b"") for name in files}}
    )
    assert line in refused(capsys, tmp_path, "them/few", tmp_path / "out", *KEYS)


def test_a_hub_that_gives_no_parts_is_named(hub, source, capsys, tmp_path):
    """A dry run refuses such a hub, as it does not load 140 GB instead; a conversion downloads first."""
    hub.whole_files = True
    hub.models["them/whole"] = Repository()
    hub.models["them/whole"].commit({**files_of(source), "notes.txt": b""})
    line = refused(capsys, tmp_path, "them/whole", tmp_path / "out", *KEYS, "--dry-run")
    assert f"them/whole: the hub gives no parts of {SHARDS[0]}; download the model (hf download them/whole)" in line
    assert main(["convert", "them/whole", str(tmp_path / "out"), *KEYS, "--no-verify"]) == 0


def test_a_tokenizer_with_code_is_refused_before_the_weights(hub, source, capsys, tmp_path):
    files = files_of(source)
    settings = {**json.loads(files["tokenizer_config.json"]), "auto_map": {"AutoTokenizer": ["x.Y", None]}}
    hub.models["them/code"] = Repository()
    hub.models["them/code"].commit({**files, "tokenizer_config.json": json.dumps(settings).encode()})
    assert "the tokenizer needs code of its own" in refused(capsys, tmp_path, "them/code", tmp_path / "out", *KEYS)
    assert weights(hub, whole=True) == []


def test_a_part_of_a_file_is_the_tensor(hub, source):
    _, there = find_source("them/base", None)
    assert there is not None
    for name in there.names()[1:2]:
        file, want = HubFile(there, name), load_file(source / name)
        assert {*file.keys()} == want.keys()
        assert all(torch.equal(file.get_tensor(key), want[key]) for key in want)
