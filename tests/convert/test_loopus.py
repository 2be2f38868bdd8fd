"""LoopUS: its gate, and fine-tunes as they are on disk; test_import.py has the logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loopwise.cli import main
from tests.helpers.convert import change_fields, expected, import_refused, shard, source


def imported(folder: Path) -> Any:
    assert main(["convert", str(folder), str(folder.parent / "out")]) == 0
    return AutoModelForCausalLM.from_pretrained(folder.parent / "out").eval()


def test_its_gate_and_its_depths(tmp_path):
    model, want = imported(source("loopus", tmp_path / "source")), expected("loopus")
    config = model.config
    assert (config.prelude, config.core, config.coda) == ([0, 1], [2, 3], [4])
    assert (config.num_recurrences, config.trained_recurrences) == (3, {"mean": 2.0, "min": 1, "max": 3})
    assert (config.recurrence_damping, config.exit, config.eos_token_id) == ("selective", None, 61)
    (note,) = json.loads((tmp_path / "out/loopwise.json").read_text())["notes"]
    assert "is no exit rule of loopwise: by default every token runs 3 recurrences" in note
    with torch.no_grad():
        out = model(want["ids"], num_recurrences=4, output_states=True)
    torch.testing.assert_close(out.exit_logits, want["gates_4"], rtol=0, atol=1e-5)


def test_shards_in_bfloat16_with_the_old_names(tmp_path):
    folder = source("loopus", tmp_path / "source")
    tensors = {
        name.replace("reasoning.", "plateau."): tensor.bfloat16()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    shard(folder, tensors, 2)
    change_fields(folder, decoder_layer_indices=[-4], reasoning_layer_indices=None, halting_strategy="cdf")
    model, again = imported(folder), source("loopus", tmp_path / "again")
    assert model.dtype == torch.bfloat16
    assert (model.config.core, model.config.coda) == ([2, 3], [4])
    assert model.config.exit == {"rule": "gate", "threshold": 0.9}
    rounded = {name: tensor.bfloat16().float() for name, tensor in load_file(again / "model.safetensors").items()}
    save_file(rounded, again / "model.safetensors")
    assert main(["convert", str(again), str(tmp_path / "float")]) == 0
    want, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval(), expected("loopus")["ids"]
    with torch.no_grad():
        torch.testing.assert_close(model.float()(ids).logits, want(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"base_config_dict": {"model_type": "gemma"}}, "base_config_dict of {'model_type': 'gemma'}"),
        ({"decoder_layer_indices": [3, 4]}, "each of layers 0 to 4 stands in one of them"),
        ({"encoder_layer_indices": [-2]}, "encoder_layer_indices=[2, 3, 4]"),
    ],
)
def test_others_are_refused(fields, words, tmp_path, capsys):
    folder = source("loopus", tmp_path / "source")
    change_fields(folder, **fields)
    assert words in import_refused(capsys, folder, tmp_path / "out")


def test_windows_of_its_base_are_refused(tmp_path, capsys):
    folder = source("loopus", tmp_path / "source")
    base = json.loads((folder / "config.json").read_text())["base_config_dict"]
    change_fields(folder, base_config_dict={**base, "layer_types": ["full_attention"] * 4 + ["sliding_attention"]})
    line = import_refused(capsys, folder, tmp_path / "out", "--dry-run")
    assert "a LoopUS checkpoint with 'sliding_attention' in layer_types" in line


def test_a_config_without_its_base_is_refused(tmp_path, capsys):
    folder = source("loopus", tmp_path / "source")
    fields = json.loads((folder / "config.json").read_text())
    del fields["base_config_dict"]
    (folder / "config.json").write_text(json.dumps(fields))
    assert "lacks 'base_config_dict'" in import_refused(capsys, folder, tmp_path / "out")


def test_no_plain_model_has_its_gate(tmp_path, capsys):
    imported(source("loopus", tmp_path / "source"))
    for depth in ("1", "2"):
        assert main(["export", str(tmp_path / "out"), str(tmp_path / "plain"), "--unroll", depth]) == 2
        line = capsys.readouterr().err
        assert "recurrence_damping=selective" in line
        assert "--unroll 1 exports it" not in line
