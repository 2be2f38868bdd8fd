"""Parcae: depths of rows, forks as they are on disk, and options of the authors' code that are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loopwise.cli import main
from loopwise.model.injection import Injection
from loopwise.serve import Engine, Params
from tests.helpers.convert import change_fields, expected, import_refused, shard, source


def imported(folder: Path, *keys: str) -> Any:
    out = folder.parent / f"{folder.name}-out"
    assert main(["convert", str(folder), str(out), *keys]) == 0
    return AutoModelForCausalLM.from_pretrained(out).eval()


@torch.no_grad()
def test_depths_and_a_depth_for_each_row(tmp_path):
    """The authors' code draws a depth for each row by default: (2, 3) for the golden ones."""
    model, want = imported(source("parcae", tmp_path / "parcae")), expected("parcae")
    config = model.config
    assert (config.prelude, config.core, config.coda) == ([0], [1, 2], [3])
    assert (config.num_recurrences, config.trained_recurrences) == (4, {"mean": 4, "min": 1, "max": 10})
    assert config.source_config.value_embeddings == [False, True, False, True]
    assert (config.state_init, config.state_std) == ("normal", (2 / (5 * 48)) ** 0.5)
    got = model(want["ids"], initial_state=want["state"], num_recurrences=want["depths"], use_cache=False).logits
    torch.testing.assert_close(got, want["logits_depths"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_fork_in_shards_of_bfloat16_with_a_head_of_its_own(tmp_path):
    folder = source("parcae", tmp_path / "fork")
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    rounded["lm_head.weight"] = rounded["transformer.wte.weight"].flip(0).contiguous()
    del rounded["freqs_cis"]  # of another rope_base
    shard(folder, rounded, 3)
    change_fields(folder, tie_embeddings=False, _class_name=None, rope_settings={"rope_base": 10_000})
    plain = source("parcae", tmp_path / "plain")
    save_file({name: tensor.float() for name, tensor in rounded.items()}, plain / "model.safetensors")
    change_fields(plain, tie_embeddings=False, rope_settings={"rope_base": 10_000})
    model, want, ids = imported(folder), imported(plain), expected("parcae")["ids"]
    assert model.dtype == torch.bfloat16
    state = expected("parcae")["state"]
    got = model.float()(ids, initial_state=state).logits
    torch.testing.assert_close(got, want(ids, initial_state=state).logits, rtol=0, atol=1e-4)
    assert (got - expected("parcae")["logits_4"]).abs().max() > 0.1


def test_waves_embed_the_tokens_of_each_position(tmp_path):
    """Drafts are replaced: a position then starts anew with another token."""
    folder = source("parcae", tmp_path / "parcae")
    imported(folder, "state_init=zeros")
    want, prompts = expected("parcae"), expected("parcae")["ids"].tolist()
    options: dict[str, Any] = {"temperature": 0, "exit_rule": "fixed", "ignore_eos": True}
    engine = Engine(tmp_path / "parcae-out", max_num_seqs=2, max_model_len=32, max_in_flight=4)
    for depth in (2, 4):
        params = [Params(8, depth, decoder="wave", max_in_flight=width, **options) for width in (4, 2)]
        replies = engine.generate(prompts, params)
        assert [list(reply.tokens) for reply in replies] == want[f"tokens_{depth}"].tolist()


def test_embeddings_without_tokens_are_refused(tmp_path):
    model = imported(source("parcae", tmp_path / "parcae"))
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 48))


def test_its_injection_starts_as_a_mean():
    injection = Injection("diagonal", 4)
    torch.nn.init.zeros_(injection.step)
    torch.nn.init.zeros_(injection.log_rate)
    s, e = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for start, want in (("input", (s + e) / 2), ("zeros", s / 2 + e)):
        injection.weight.data = Injection.preserving_weight("diagonal", 4, start)
        torch.testing.assert_close(injection(s, e), want)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"injection_type": "linear"}, "injection_type='linear' is not supported; it is 'diagonal'"),
        ({"logit_softcap": 15.0}, "logit_softcap=15.0"),
        ({"qk_bias": True}, "qk_bias=True"),
        ({"recurrent_embedding_dimension": 96}, "recurrent_embedding_dimension=96"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"init_strategy": "takase"}, "init_strategy='takase' of this Parcae checkpoint: scaled, scaled-zero"),
        ({"state_init": "unit"}, "state_init='unit'"),
        ({"rope_settings": {"use_rope": False}}, "rope_base alone may differ"),
    ],
)
def test_options_that_the_released_models_lack_are_refused(fields, words, tmp_path, capsys):
    folder = source("parcae", tmp_path / "parcae")
    change_fields(folder, **fields)
    assert words in import_refused(capsys, folder, tmp_path / "out", "--dry-run")


def test_pickles_and_other_models_of_the_authors_are_refused(tmp_path, capsys):
    folder = source("parcae", tmp_path / "parcae")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "model.pt")
    assert "model.pt: pickled weights" in import_refused(capsys, folder, tmp_path / "out")
    fields = json.loads((folder / "config.json").read_text())
    del fields["model_class_name"]
    fields["_class_name"] = "GPTConfig"  # their plain model
    (folder / "config.json").write_text(json.dumps(fields))
    assert "has no model_type" in import_refused(capsys, folder, tmp_path / "out")


@pytest.mark.parametrize("number", [1, 3])
def test_a_gate_without_value_embeddings_is_refused_by_name_and_so_are_they_without_it(number, tmp_path, capsys):
    """As where the authors' rules for the two disagree, in models with an odd number of layers."""
    folder = source("parcae", tmp_path / "parcae")
    tensors = load_file(folder / "model.safetensors")
    layer = {1: "core_block.0", 3: "coda.0"}[number]
    pair = [f"value_embeds.{number}.weight", f"transformer.{layer}.attn.ve_gate.weight"]
    for lacking, present in (pair, pair[::-1]):
        save_file({name: t for name, t in tensors.items() if name != lacking}, folder / "model.safetensors")
        line = import_refused(capsys, folder, tmp_path / "out", "--dry-run")
        assert f"{present} of this Parcae checkpoint stands without {lacking}; a layer has both, or neither" in line
