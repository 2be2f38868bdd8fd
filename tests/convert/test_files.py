"""Weight files are chosen as transformers chooses them; a generation config can be saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from loopwise.checkpoint import check_same_for_vllm, weight_files
from loopwise.cli import main
from loopwise.convert.generation import savable
from loopwise.errors import UserError
from tests.helpers.tiny import save_source

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """`one`: a single file. `shards`: another model, in shards."""
    folder = tmp_path_factory.mktemp("two")
    save_source(folder / "one")
    save_source(folder / "shards", seed=1, shard="100KB")
    return folder


def mixed(two: Path, directory: Path, *names: str) -> Path:
    """The single file of `one`, and of `shards` the files that match `names`."""
    shutil.copytree(two / "one", directory)
    for name in names:
        for file in (two / "shards").glob(name):
            shutil.copy(file, directory)
    return directory


@pytest.mark.parametrize("left", [["model-*.safetensors", INDEX], ["model-*.safetensors"], [INDEX]])
def test_the_single_file_comes_first(two, tmp_path, left):
    """Leftovers of another save are no part of the model, as in transformers."""
    source = mixed(two, tmp_path / "source", *left)
    assert [file.name for file in weight_files(source)] == ["model.safetensors"]
    assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,4,1"]) == 0
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids, num_recurrences=1).logits
        want = AutoModelForCausalLM.from_pretrained(source)(ids).logits
        other = AutoModelForCausalLM.from_pretrained(two / "shards")(ids).logits
    assert (got - want).abs().max() < 1e-5 < (got - other).abs().max()
    said = r"transformers loads model\.safetensors, vLLM not the same files" if left != [INDEX] else "missing, though"
    with pytest.raises(UserError, match=said):
        check_same_for_vllm(source, weight_files(source))


def test_shards_of_an_older_save_are_left_out(two, tmp_path):
    source = Path(shutil.copytree(two / "shards", tmp_path / "source"))
    tensors = load_file(two / "one" / "model.safetensors")
    save_file(tensors, source / "model-00001-of-00099.safetensors", {"format": "pt"})
    assert "model-00001-of-00099.safetensors" not in [file.name for file in weight_files(source)]
    check_same_for_vllm(source, weight_files(source))  # it goes by the index, too


def test_the_files_that_the_config_names(two, tmp_path):
    source = Path(shutil.copytree(two / "one", tmp_path / "source"))
    shutil.copy(source / "model.safetensors", source / "other.safetensors")
    config = json.loads((source / "config.json").read_text())
    for name, found in (("other.safetensors", True), ("gone.safetensors", False), ("../one", False), (3, False)):
        (source / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        if found:
            assert [file.name for file in weight_files(source)] == [name]
        else:
            with pytest.raises(UserError, match=r"transformers_weights|gone"):
                weight_files(source)


@pytest.mark.parametrize("name", ["../one/model.safetensors", "/etc/hostname", "sub/model.safetensors"])
def test_an_index_names_files_beside_it(two, tmp_path, name):
    source = Path(shutil.copytree(two / "shards", tmp_path / "source"))
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="weights lie in the same directory"):
        weight_files(source)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.6, "do_sample": True}),
        ({"top_k": 20}, {"top_k": 20, "do_sample": True}),
        ({"temperature": 0.9, "do_sample": False}, {"do_sample": False}),
        ({"pad_token_id": -1, "eos_token_id": [1, 2]}, {"eos_token_id": [1, 2]}),
        ({"length_penalty": 1.2, "temperature": 0.5}, {"temperature": 0.5, "do_sample": True}),
        ({"num_return_sequences": 2}, {"num_return_sequences": 2, "do_sample": True}),
        ({"max_new_tokens": 0, "eos_token_id": 1}, {"eos_token_id": 1}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"temperature": 0.0}, {"do_sample": False}),
        ({"temperature": -1, "do_sample": True}, {"do_sample": True}),
        ({"top_p": 1.5, "top_k": "50", "min_p": 2}, {}),
        ({}, {}),
    ],
)
def test_a_generation_config_that_transformers_refuses_to_save(tmp_path, given, kept):
    fields, notes = savable(given)
    assert fields == kept
    assert bool(notes) == (given != kept)
    GenerationConfig.from_dict(fields).save_pretrained(tmp_path)


@pytest.mark.parametrize("ends", ["</s>", 1.0, [[1]], True])
def test_end_tokens_are_ids(ends):
    with pytest.raises(ValueError, match="a token id, or a list of them"):
        savable({"eos_token_id": ends})


def test_an_output_can_be_saved_again(capsys, two, tmp_path):
    source = Path(shutil.copytree(two / "one", tmp_path / "source"))
    (source / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "pad_token_id": -1}')
    assert main(["convert", str(source), str(tmp_path / "out"), "layers.core=1,2", "injection=none"]) == 0
    assert "note: generation_config.json: do_sample=true added" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "plain"), "--unroll", "2"]) == 0
    for name in ("out", "plain"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.generation_config.temperature == 0.9
        model.save_pretrained(tmp_path / "again")
        shutil.rmtree(tmp_path / "again")
    (source / "generation_config.json").write_text("{")
    assert main(["convert", str(source), str(tmp_path / "out2"), "sizes=1,2,1"]) == 2
    assert "not valid JSON" in capsys.readouterr().err


def test_an_export_is_replaced_with_force_and_nothing_else(capsys, two, tmp_path):
    assert main(["convert", str(two / "one"), str(tmp_path / "out"), "layers.core=1,2", "injection=none"]) == 0
    argv = ["export", str(tmp_path / "out"), str(tmp_path / "plain"), "--unroll"]
    assert main([*argv, "2"]) == 0
    assert json.loads((tmp_path / "plain" / "loopwise.json").read_text())["unroll"] == 2
    capsys.readouterr()
    assert main([*argv, "1"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*argv, "1", "--force"]) == 0
    (tmp_path / "plain" / "loopwise.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main([*argv, "1", "--force"]) == 2
    assert "--force replaces only what Loopwise wrote" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_source_that_collects_router_logits(capsys, tmp_path):
    """Its first forward failed: the source's layer list holds taps, and no router's logits were found."""
    source = save_source(tmp_path / "source", "mixtral", output_router_logits=True)
    assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1"]) == 0
    assert "note: output_router_logits=true of the source's config is left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "loopwise.json").read_text())["max_dlogit"] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[3, 4, 5]])
    assert model(ids).logits.shape == (1, 3, 320)
    assert len(model(ids, output_router_logits=True, num_recurrences=3).router_logits) == 8


def test_an_adapter_beside_a_model_is_refused_by_every_verb(capsys, two, tmp_path):
    """transformers would add it to the weights without a word, and vLLM would not."""
    out, text = tmp_path / "out", tmp_path / "text.txt"
    assert main(["convert", str(two / "one"), str(out), "sizes=1,2,1", "--no-verify"]) == 0
    (out / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    text.write_text("the cat sat on the mat\n" * 50)
    capsys.readouterr()
    for argv in (
        ["generate", out, "prompt=the"],
        ["eval", out, f"data={text}"],
        ["train", out, tmp_path / "run", f"data.train={text}", "steps=1"],
        ["serve", out, "--recipe", "exact"],
        ["export", out, tmp_path / "plain", "--unroll", "1"],
        ["inspect", out],
        ["calibrate", out, text],
    ):
        assert main([str(word) for word in argv]) == 2, argv
        said = capsys.readouterr().err
        assert "has an adapter_config.json, a PEFT adapter" in said, argv
        assert said.count("\n") == 1, argv
    assert not (tmp_path / "run").exists()
