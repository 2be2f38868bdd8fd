"""Public recurrent checkpoints: the imported model computes what the authors' own code did, on tiny random ones."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from loopwise.cli import main
from loopwise.convert import formats
from tests.helpers.convert import GOLDEN, change_fields, expected, golden_formats, import_refused, sizes, source

# Golden folder -> its format. The routed ones are those of test_mor.py.
FORMATS = {name: kind for name, kind in golden_formats().items() if "MoR" not in kind}


def imported(name: str, folder: Path) -> Any:
    assert main(["convert", str(source(name, folder / "source")), str(folder / "out")]) == 0
    return AutoModelForCausalLM.from_pretrained(folder / "out").eval()


def test_every_format_has_a_golden_checkpoint():
    assert {kind.name for kind in formats.FORMATS} == set(golden_formats().values())


@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_authors_code(name, tmp_path):
    model, want = imported(name, tmp_path), expected(name)
    facts = json.loads((tmp_path / "out" / "loopwise.json").read_text())
    assert facts["format"] == FORMATS[name]
    assert facts["max_dlogit"] < 1e-4
    assert facts["parameters"]["source"] == facts["parameters"]["unique"] == sum(p.numel() for p in model.parameters())
    ids, state = want["ids"], want.get("state")
    with torch.no_grad():
        for depth in (1, 2, 4, 8):
            got = model(ids, num_recurrences=depth, initial_state=state).logits
            torch.testing.assert_close(got, want[f"logits_{depth}"], rtol=0, atol=1e-4)
        mask = torch.ones(2, 15, dtype=torch.long)  # the authors' code knows no padding
        mask[:, :3] = 0
        padded = torch.cat([ids.new_zeros(2, 3), ids], 1)
        shifted = None if state is None else torch.cat([torch.zeros(2, 3, state.shape[-1]), state], 1)
        got = model(padded, attention_mask=mask, num_recurrences=4, initial_state=shifted).logits[:, 3:]
        torch.testing.assert_close(got, want["logits_4"], rtol=0, atol=1e-4)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_ouro_has_its_exit_gates_and_the_right_special_tokens(tmp_path):
    folder = source("ouro", tmp_path / "source")
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "early_exit_threshold": 0.75}))
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    model, want = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), expected("ouro")
    with torch.no_grad():
        out = model(want["ids"], num_recurrences=4, output_states=True)
    torch.testing.assert_close(out.exit_logits, want["gates_4"], rtol=0, atol=1e-5)
    assert model.config.exit == {"rule": "gate", "threshold": 0.75}
    assert model.config.trained_recurrences == {"mean": 4, "min": 1, "max": 4}
    for found in (model.config, model.generation_config):
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, 0)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("name", ["ouro", "llama", "olmo", "loopus", "mor-token"])
def test_yarn_scales_attention_as_in_the_authors_code(name, tmp_path):
    """All of them run transformers' rotary embedding, or one like it, whose scale the formulas have to share."""
    folder = source(name, tmp_path / "source")
    if name == "loopus":
        base = json.loads((folder / "config.json").read_text())["base_config_dict"]
        change_fields(folder, base_config_dict={**base, "rope_parameters": {**base["rope_parameters"], **YARN}})
    else:
        change_fields(folder, rope_scaling=YARN)
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    source_config = AutoConfig.from_pretrained(tmp_path / "out").source_config
    assert LlamaRotaryEmbedding(source_config).attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


def test_ouro_without_a_threshold_has_no_exit_rule(tmp_path):
    folder = source("ouro", tmp_path / "source")
    change_fields(folder, early_exit_threshold=None)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--no-verify"]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "out").exit is None


def test_a_kv_policy_of_one_slot_is_added(tmp_path):
    """The formulas have keys of every depth; the model that is written reads the first one's."""
    folder, found = source("huginn", tmp_path / "source"), {}
    for policy in ("first", "per-depth"):
        out = tmp_path / policy
        assert main(["convert", str(folder), str(out), f"kv_policy={policy}"]) == 0
        model, ids = AutoModelForCausalLM.from_pretrained(out).eval(), torch.arange(12)[None]
        state = torch.zeros(1, 12, model.config.hidden_size)
        with torch.no_grad():
            found[policy] = model(ids, num_recurrences=4, initial_state=state, use_cache=False).logits
        assert model.config.kv_policy == policy
    assert not torch.allclose(found["first"], found["per-depth"], atol=1e-4)


def test_what_the_checkpoint_says_is_kept(tmp_path):
    config = imported("huginn", tmp_path).config
    assert (config.num_recurrences, config.state_init, config.recurrence_norm) == (4, "normal", "last")
    assert config.state_std == pytest.approx((2 / 5) ** 0.5)  # sqrt(2 / (5 d)) times sqrt(d)
    assert config.trained_recurrences == {"mean": 4, "min": 1, "max": 16}
    (tmp_path / "llama").mkdir()
    config = imported("llama", tmp_path / "llama").config
    assert config.source_config.rope_parameters["rope_theta"] == 500000.0  # not rope_base
    assert config.source_config.num_key_value_heads == 2


def test_the_model_has_the_type_of_most_parameters(tmp_path):
    """Norms in float32 among matrices in bfloat16 keep their values, and a load gives all of them one type."""
    folder = source("ouro", tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(mixed, folder / "model.safetensors")
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["source.model.norm.weight"], tensors["model.norm.weight"])


def test_other_tensors_are_refused(capsys, tmp_path):
    folder, out = source("huginn", tmp_path / "source"), tmp_path / "out"
    tensors = load_file(folder / "model.safetensors")

    def save(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, folder / "model.safetensors")

    save({**tensors, "transformer.extra.weight": torch.zeros(2)})
    assert "transformer.extra.weight is not one of a Huginn checkpoint" in import_refused(capsys, folder, out)
    save({name: tensor for name, tensor in tensors.items() if name != "transformer.coda.0.mlp.fc.weight"})
    assert "transformer.coda.0.mlp.fc.weight, and this one lacks it" in import_refused(capsys, folder, out)
    save({"transformer.h.0.weight": torch.zeros(2)})
    line = import_refused(capsys, folder, out)
    assert "no known format" in line
    for name in FORMATS.values():
        assert f"{name}: " in line
    assert "Huginn: no transformer.core_block.0.norm_4.weight" in line


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("ouro", "model.rotary_emb.inv_freq"),
        ("nanbeige", "model.rotary_emb.inv_freq"),
        ("loopformer", "gpt.transformer.h.blocks.0.attn.bias"),
    ],
)
def test_tables_that_are_computed_are_read_over(name, table, tmp_path):
    folder = source(name, tmp_path / "source")
    save_file({**load_file(folder / "model.safetensors"), table: torch.ones(4)}, folder / "model.safetensors")
    assert main(["convert", str(folder), str(tmp_path / "out"), "--no-verify"]) == 0
    assert not [written for written in load_file(tmp_path / "out" / "model.safetensors") if "inv_freq" in written]
    facts = json.loads((tmp_path / "out" / "loopwise.json").read_text())["parameters"]
    assert facts["source"] == facts["unique"]


def cases() -> list[Any]:
    names = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
    return [pytest.param(name, marks=[] if name in ("huginn", "mor-expert") else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", cases())
def test_tensors_of_wrong_shape_and_wrong_configs_are_refused(name, capsys, tmp_path):
    folder, out = source(name, tmp_path / "source"), tmp_path / "out"
    tensors, config = load_file(folder / "model.safetensors"), (folder / "config.json").read_text()
    needed = [tensor for tensor in tensors if tensor != "freqs_cis"]
    for tensor in needed:
        first, *rest = tensors[tensor].shape
        optional = tensor.endswith("router_bias")
        for wrong in (torch.zeros(first + 1, *rest), torch.zeros(first, *rest, 2), *([] if optional else [None])):
            changed = {**tensors, tensor: wrong}
            save_file({key: value for key, value in changed.items() if value is not None}, folder / "model.safetensors")
            line = import_refused(capsys, folder, out, "--dry-run")
            assert wrong is None or tensor.rpartition(".")[2] in line
    save_file(tensors, folder / "model.safetensors")
    width, vocabulary = sizes(name)
    for key, value in ((width, -1), (width, "x"), (vocabulary, 63)):
        fields = {**json.loads(config), "padded_vocab_size": None}
        *outer, last = key.split(".")
        functools.reduce(dict.__getitem__, outer, fields)[last] = value
        (folder / "config.json").write_text(json.dumps(fields))
        import_refused(capsys, folder, out, "--dry-run")


@pytest.mark.parametrize("name", ["huginn", "parcae", "loopformer"])
def test_a_tied_head_that_differs_is_refused(name, capsys, tmp_path):
    """The import has the embeddings for it. A head that equals them passes, as transformers may have written it."""
    folder, out = source(name, tmp_path / "source"), tmp_path / "out"
    tensors = load_file(folder / "model.safetensors")
    (embeddings,) = (tensor for tensor in tensors if tensor.endswith("transformer.wte.weight"))
    for head, fits in ((tensors[embeddings].flip(0).contiguous(), False), (tensors[embeddings].clone(), True)):
        save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
        if fits:
            assert main(["convert", str(folder), str(out), "--no-verify"]) == 0
        else:
            line = import_refused(capsys, folder, out, "--no-verify")
            assert f"tensor lm_head.weight of this {FORMATS[name]} checkpoint is not {embeddings}, to which" in line


@pytest.mark.parametrize("name", ["huginn", "parcae"])
def test_a_rotary_table_of_another_base_is_refused(name, capsys, tmp_path):
    """The authors' code loads the stored one. One that was rounded to bfloat16 passes."""
    folder, out = source(name, tmp_path / "source"), tmp_path / "out"
    tensors = load_file(folder / "model.safetensors")
    rounded = tensors["freqs_cis"].bfloat16().float()
    save_file({**tensors, "freqs_cis": rounded}, folder / "model.safetensors")
    assert main(["convert", str(folder), str(out), "--no-verify"]) == 0
    change_fields(folder, rope_base=10_000, rope_settings={"rope_base": 10_000})
    line = import_refused(capsys, folder, tmp_path / "other", "--no-verify")
    assert f"tensor freqs_cis of this {FORMATS[name]} checkpoint is not the rotary table of rope_base=10000" in line


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("huginn", {"test_time_noise": 0.1}, "huginn_raven checkpoint with test_time_noise=0.1 is not supported"),
        ("huginn", {"injection_type": "add"}, "huginn_raven checkpoint with injection_type='add'"),
        ("llama", {"nonlin_name": "GELU"}, "huginn_raven checkpoint with nonlin_name='GELU'"),
        ("ouro", {"use_sliding_window": True}, "Ouro checkpoint with use_sliding_window=True"),
        ("ouro", {"layer_types": ["full_attention", "sliding_attention"]}, "Ouro checkpoint with 'sliding_attention'"),
        ("nanbeige", {"layer_types": ["sliding_attention"]}, "Nanbeige checkpoint with 'sliding_attention'"),
    ],
)
def test_options_that_change_the_computation_are_refused_by_name(name, fields, words, capsys, tmp_path):
    folder = source(name, tmp_path / "source")
    change_fields(folder, **fields)
    assert words in import_refused(capsys, folder, tmp_path / "out", "--dry-run")


def test_other_keys_and_configs_are_refused(capsys, tmp_path):
    folder, out = source("llama", tmp_path / "source"), tmp_path / "out"
    assert "leave out sizes" in import_refused(capsys, folder, out, "sizes=1,2,1")
    assert "leave out lora" in import_refused(capsys, folder, out, "lora.rank=4")
    fields = json.loads((folder / "config.json").read_text())
    del fields["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(fields))
    assert "lacks 'intermediate_size'" in import_refused(capsys, folder, out)


def test_an_import_is_verified(capsys, tmp_path, monkeypatch):
    from loopwise.convert import import_checkpoint

    folder, out = source("olmo", tmp_path / "source"), tmp_path / "out"
    monkeypatch.setattr(import_checkpoint, "_make", lambda raw, names, change: change(*map(raw.read, names)) * 1.01)
    assert "verification failed" in import_refused(capsys, folder, out)
