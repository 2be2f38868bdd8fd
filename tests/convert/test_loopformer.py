"""LoopFormer: biases, the authors' own file names, and what an import of it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loopwise.cli import main
from tests.helpers.convert import change_fields, expected, import_refused, shard, source


def imported(folder: Path) -> Any:
    out = folder.parent / f"{folder.name}-out"
    assert main(["convert", str(folder), str(out)]) == 0
    return AutoModelForCausalLM.from_pretrained(out).eval()


def test_its_config(tmp_path):
    config = imported(source("loopformer", tmp_path / "source")).config
    assert (config.prelude, config.core, config.coda) == ([], [0, 1, 2], [])
    assert (config.num_recurrences, config.trained_recurrences) == (8, {"mean": 8, "min": 1, "max": 8})
    assert (config.eos_token_id, config.max_position_embeddings) == (61, 40)


@torch.no_grad()
def test_shards_in_bfloat16_with_the_names_of_the_authors_code(tmp_path):
    folder, plain = source("loopformer", tmp_path / "source"), source("loopformer", tmp_path / "plain")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({name: tensor.float() for name, tensor in tensors.items()}, plain / "model.safetensors")
    renamed = {name.removeprefix("gpt."): tensor for name, tensor in tensors.items()}
    shard(folder, {**renamed, "lm_head.weight": renamed["transformer.wte.weight"].clone()}, 2)
    change_fields(folder, max_model_loops=4)
    model, ids = imported(folder), expected("loopformer")["ids"]
    assert (model.dtype, model.config.num_recurrences) == (torch.bfloat16, 4)
    got = model.float()(ids, num_recurrences=2).logits
    torch.testing.assert_close(got, imported(plain)(ids, num_recurrences=2).logits, rtol=0, atol=1e-4)


def test_biases_are_verified_against_the_formulas(tmp_path):
    folder = source("loopformer", tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    linears = [name for name in tensors if ".attn.c_" in name or ".mlp.c_" in name]
    biases = {name.replace("weight", "bias"): torch.randn(len(tensors[name])) / 4 for name in linears}
    save_file({**tensors, **biases}, folder / "model.safetensors")
    change_fields(folder, bias=True)
    imported(folder)
    facts = json.loads((tmp_path / "source-out" / "loopwise.json").read_text())
    assert facts["max_dlogit"] < 1e-4


def test_refused(tmp_path, capsys):
    folder = source("loopformer", tmp_path / "source")
    change_fields(folder, n_head=5)
    assert "n_head=5 does not divide n_embd=32" in import_refused(capsys, folder, tmp_path / "out")
    change_fields(folder, n_head=4)
    imported(folder)
    assert main(["export", str(tmp_path / "source-out"), str(tmp_path / "plain"), "--unroll", "1"]) == 2
    assert "has ungated layers, and transformers has no such model" in capsys.readouterr().err
