"""Nanbeige4.2: imports against a plain loop over transformers' Llama layers; recurrent models that are only named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from loopwise.cli import main
from loopwise.convert.formats.nanbeige import OFF
from loopwise.serve import Engine, Params
from tests.helpers.convert import change_fields, expected, import_refused, shard, source
from tests.helpers.tiny import tokenizer

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def llama(folder: Path) -> Any:
    """The layers of the checkpoint in `folder` as a plain Llama, in float32."""
    fields = json.loads((folder / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    more = ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    rope = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
    model = LlamaForCausalLM(LlamaConfig(**{name: fields[name] for name in (*names, *more)}, rope_parameters=rope))
    tensors = {name: t.float() for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert all(name.endswith("inv_freq") for name in unexpected)
    assert missing == (["lm_head.weight"] if fields["tie_word_embeddings"] else [])
    return model.eval()


@torch.no_grad()
def looped(model: Any, ids: torch.Tensor, loops: int, skip: bool = False, caches: Any = None) -> torch.Tensor:
    """Logits [B, T, V] of ids [B, T]: all layers `loops` times, each time with a cache of its own, after which comes
    the final norm, with `skip` after the last alone."""
    inner = model.model
    past = caches[0].get_seq_length() if caches else 0
    x = inner.embed_tokens(ids)
    positions = torch.arange(past, past + ids.shape[1])[None]
    visible = torch.ones(ids.shape[1], past + ids.shape[1], dtype=torch.bool).tril(past)[None, None]
    rotary = inner.rotary_emb(x, positions)
    for loop in range(loops):
        for layer in inner.layers:
            x = layer(
                x,
                attention_mask=visible,
                position_ids=positions,
                past_key_values=caches[loop] if caches else None,
                position_embeddings=rotary,
            )
        if not skip or loop == loops - 1:
            x = inner.norm(x)
    return model.lm_head(x)


def continued(model: Any, ids: torch.Tensor, loops: int, skip: bool) -> torch.Tensor:
    """8 tokens that the plain loop adds to ids [B, T], one by one, with a cache for every loop."""
    caches = [DynamicCache() for _ in range(loops)]
    new = ids
    for _ in range(8):
        new = looped(model, new, loops, skip, caches)[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
    return ids


def test_the_golden_logits_are_those_of_a_plain_loop(tmp_path):
    model, want = llama(source("nanbeige", tmp_path / "source")), expected("nanbeige")
    for loops in (1, 2, 4, 8):
        torch.testing.assert_close(looped(model, want["ids"], loops), want[f"logits_{loops}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_equals_a_plain_loop_over_llama_layers(skip, tmp_path):
    folder = source("nanbeige", tmp_path / "source")
    change_fields(folder, skip_loop_final_norm=skip)
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (model.config.num_recurrences, model.config.trained_recurrences) == (2, {"mean": 2, "min": 2, "max": 2})
    assert model.config.recurrence_norm == ("none" if skip else "between")
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (60, 61, 0)
    plain, ids = llama(folder), expected("nanbeige")["ids"]
    for loops in (1, 2, 4):
        with torch.no_grad():
            got = model(ids, num_recurrences=loops, use_cache=False).logits
        torch.testing.assert_close(got, looped(plain, ids, loops, skip), rtol=0, atol=1e-6)
        want = continued(plain, ids, loops, skip)
        for cached in (True, False):
            options = {"num_recurrences": loops, "use_cache": cached, "attention_mask": torch.ones_like(ids), **GREEDY}
            assert torch.equal(model.generate(ids, **options), want)


def test_shards_in_bfloat16_with_a_tied_head_and_without_loopwise(tmp_path):
    """As fine-tunes are: `torch_dtype`, several files, a tied head, and old tables of rotary frequencies."""
    folder = source("nanbeige", tmp_path / "source")
    tensors = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
    del tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    shard(folder, tensors, 2)
    change_fields(folder, tie_word_embeddings=True, torch_dtype="bfloat16")
    out = tmp_path / "out"
    assert main(["convert", str(folder), str(out)]) == 0
    program = f"""
import sys
sys.modules["loopwise"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True).eval()
assert model.dtype == torch.bfloat16 and "transformers_modules" in type(model).__module__
ids = torch.tensor({expected("nanbeige")["ids"].tolist()})
with torch.no_grad():
    torch.save(model.float()(ids, num_recurrences=2).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    want = looped(llama(folder), expected("nanbeige")["ids"], 2)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), want, rtol=0, atol=1e-5)


def test_the_lane_engine_gives_the_tokens_of_generate(tmp_path):
    folder = source("nanbeige", tmp_path / "source")
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    prompts = expected("nanbeige")["ids"].tolist()
    prompts[1] = prompts[1][:5]
    for depth in (1, 2, 4):
        options = Params(temperature=0, max_tokens=8, num_recurrences=depth, exit_rule="fixed", ignore_eos=True)
        replies = Engine(tmp_path / "out", max_num_seqs=2, max_model_len=32).generate(prompts, options)
        for prompt, reply in zip(prompts, replies, strict=True):
            ids = torch.tensor([prompt])
            want = model.generate(ids, attention_mask=torch.ones_like(ids), num_recurrences=depth, **GREEDY)
            assert list(reply.tokens) == want[0, len(prompt) :].tolist()


def test_the_head_size_by_its_other_name(tmp_path):
    folder = source("nanbeige", tmp_path / "source")
    change_fields(folder, head_dim=None)
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.source_config.head_dim == 16


@pytest.mark.parametrize("name", OFF)
def test_options_that_the_released_model_leaves_off_are_refused_by_name(name, tmp_path, capsys):
    folder = source("nanbeige", tmp_path / "source")
    change_fields(folder, **{name: [1] if name.endswith(("idx", "weights")) else 1})
    line = import_refused(capsys, folder, tmp_path / "out", "--dry-run")
    assert f"a Nanbeige checkpoint with {name}=" in line


def test_other_configs_are_refused(tmp_path, capsys):
    folder = source("nanbeige", tmp_path / "source")
    change_fields(folder, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert "a Nanbeige checkpoint with rope_scaling={" in import_refused(capsys, folder, tmp_path / "out")
    change_fields(folder, rope_scaling=None, hidden_act="gelu")
    assert "a Nanbeige checkpoint with hidden_act='gelu'" in import_refused(capsys, folder, tmp_path / "out")
    change_fields(folder, hidden_act="silu", num_loops=1)  # as the models before 4.2
    assert "num_loops=1: a Nanbeige checkpoint that recurs" in import_refused(capsys, folder, tmp_path / "out")
    change_fields(folder, num_loops=2)
    assert "recurrent model already and is imported as it is: leave out sizes" in import_refused(
        capsys, folder, tmp_path / "out", "sizes=1,1,1"
    )


@pytest.mark.parametrize(
    ("model_type", "file", "words"),
    [
        ("iquestloopcoder", None, "(IQuest-Loop), and cannot be imported: its second loop mixes attention"),
        ("iquestpltcoder", None, "(LoopCoder-V2), and cannot be imported: its loops run at shifted positions"),
        ("hrm_text", None, "(HRM-Text), and cannot be imported: it has two stacks"),
        ("qwen3", ("tah_config.json", {"max_iter": 2}), "(TaH), and cannot be imported: a token that goes on"),
        (None, ("artifact_manifest.json", {"format": "xllm-native-bf16-safetensors"}), "(xLLM-loop), and cannot"),
    ],
)
def test_recurrent_models_that_are_not_supported_are_named(model_type, file, words, tmp_path, capsys):
    folder = tmp_path / "source"
    folder.mkdir()
    fields = {"model_type": model_type, "auto_map": {"AutoModel": "modeling.Model"}} if model_type else {"model": {}}
    (folder / "config.json").write_text(json.dumps(fields))
    if file:
        (folder / file[0]).write_text(json.dumps(file[1]))
    for keys in ([], ["method=recursive", "loops=2"]):
        line = import_refused(capsys, folder, tmp_path / "out", *keys)
        assert f"is a recurrent model already {words}" in line


def test_a_manifest_of_another_project_is_none_of_xllm(tmp_path, capsys):
    folder = source("nanbeige", tmp_path / "source")
    (folder / "artifact_manifest.json").write_text("{}")
    tokenizer().save_pretrained(folder)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--dry-run"]) == 0
