"""Errors of the final model are found before the first step: its files, its dtype, the disk space."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loopwise.cli import main
from loopwise.convert import ConvertRecipe, convert
from loopwise.recipe import validate
from loopwise.train.pretrained import load_model, overflow
from tests.helpers.convert import EVERY_LAYER
from tests.helpers.tiny import save_source
from tests.helpers.train_tiny import run, weights

# transformers loads them all, and refuses to save them (CASES.md 7).
REFUSED_BY_SAVING = [
    {"temperature": 0.9, "top_p": 0.6},
    {"pad_token_id": -1},
    {"top_k": 20},
    {"length_penalty": 1.2},
]


def copy(model: Path, to: Path, generation: dict[str, Any] | None = None) -> Path:
    shutil.copytree(model, to)
    if generation is not None:
        (to / "generation_config.json").write_text(json.dumps(generation))
    return to


@pytest.mark.parametrize("fields", REFUSED_BY_SAVING, ids=lambda fields: next(iter(fields)))
@pytest.mark.parametrize("kind", ["plain", "recurrent"])
def test_a_generation_config_that_transformers_does_not_save_is_kept(kind, fields, request, command, tmp_path):
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = copy(request.getfixturevalue(kind), tmp_path / "model", fields)
    with pytest.raises(ValueError, match="generation"):
        AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "saved")
    run(command(model, tmp_path / "out", "steps=2", "save_every=1"))
    for written in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        before, after = (GenerationConfig.from_pretrained(folder).to_diff_dict() for folder in (model, written))
        assert {**before, "transformers_version": ""} == {**after, "transformers_version": ""}
        assert fields.items() <= json.loads((written / "generation_config.json").read_text()).items()
        load_model(str(written))


def test_tensors_that_transformers_keeps_in_float32_are_not_rounded(command, tmp_path):
    """The bias of a router of experts."""
    convert(save_source(tmp_path / "source", "glm4_moe"), tmp_path / "model", validate(ConvertRecipe, EVERY_LAYER))
    run(command(tmp_path / "model", tmp_path / "out", "steps=1", "dtype=bfloat16"))
    kinds = {name.rpartition(".")[2]: x.dtype for name, x in weights(tmp_path / "out").items()}
    assert kinds["e_score_correction_bias"] == torch.float32
    assert kinds["weight"] == torch.bfloat16


BROKEN = {
    "the tokenizer": ("transformers.PreTrainedTokenizerBase.save_pretrained", ValueError("no such vocabulary")),
    "the config": ("transformers.PreTrainedConfig.save_pretrained", TypeError("not JSON serializable")),
    "the card": ("loopwise.train.publish.write_card", UnicodeEncodeError("ascii", "é", 0, 1, "no such letter")),
    "the disk": ("loopwise.train.publish.write_card", OSError(28, "No space left on device")),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_save_that_must_fail_fails_before_the_first_step(what, plain, command, tmp_path, monkeypatch, capsys):
    place, error = BROKEN[what]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(place, fail)
    assert main(command(plain, tmp_path / "out", "steps=2")) == 2
    shown = capsys.readouterr()
    assert "the trained model cannot be written" in shown.err
    assert len(shown.err.splitlines()) == 1
    assert "step 1" not in shown.out
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_for_the_model_is_named_at_the_start(plain, command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert main(command(plain, tmp_path / "out", "steps=2")) == 2
    words = "the trained model will take [0-9.]+ MiB, and 0.0 MiB are free there; make room first"
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_rehearsal_leaves_nothing(plain, command, tmp_path):
    run(command(plain, tmp_path / "out", "steps=1"))
    assert not list((tmp_path / "out").glob(".*"))


def scaled(model: Path, to: Path, name: str, value: float) -> Path:
    """A copy of the model with one value changed."""
    copy(model, to)
    tensors = weights(model)
    tensors[name].view(-1)[0] = value
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


NAME = "model.layers.0.mlp.up_proj.weight"


def test_weights_that_leave_the_type_are_refused_at_the_start(plain, command, tmp_path, capsys):
    """CASES.md 24 of training: float16 would hold infinity instead."""
    model = scaled(plain, tmp_path / "model", NAME, -1e5)
    assert main(command(model, tmp_path / "out", "steps=1", "dtype=float16")) == 2
    error = capsys.readouterr().err
    assert f"dtype=float16: {NAME} holds -100000, and float16 ends at 65504; choose dtype=bfloat16" in error
    assert not (tmp_path / "out").exists()
    run(command(model, tmp_path / "out", "steps=1", "dtype=bfloat16"))
    assert all(x.isfinite().all() for x in weights(tmp_path / "out").values())


def test_weights_that_leave_the_type_in_training_lose_nothing(plain, command, tmp_path, capsys):
    """The run writes a checkpoint, and continues from it to a model of another dtype."""
    settings = ["steps=1", "optimiser.learning_rate=1e5", "optimiser.warmup=0", "optimiser.schedule=constant"]
    out = tmp_path / "out"
    assert main(command(plain, out, *settings, "dtype=float16")) == 2
    error = capsys.readouterr().err
    assert "dtype=float16: after training, " in error
    assert "checkpoint-1 is written: --resume with dtype=bfloat16 or float32 writes the model of it" in error
    assert len(error.splitlines()) == 1
    assert not (out / "config.json").exists()
    run([*command(plain, out, *settings, "dtype=bfloat16"), "--resume"])
    assert (out / "config.json").is_file()
    assert all(x.isfinite().all() for x in weights(out).values())


def test_overflow_is_what_rounds_to_infinity():
    state = {"a": torch.tensor([1.0, -65519.9]), "b": torch.tensor([3.0, 65520.0]), "n": torch.tensor([10**9])}
    assert overflow({"a": state["a"], "n": state["n"]}, "float16") is None
    assert overflow(state, "float16") == "b holds 65520, and float16 ends at 65504"
    assert overflow(state, "bfloat16") is None
    assert overflow({"c": torch.tensor([3.4e38])}, "bfloat16") is not None
    assert overflow({"d": torch.tensor([float("inf")])}, "float16") is None


def test_fields_that_need_code_or_reshape_outputs_do_not_reach_a_plain_model(plain, command, tmp_path):
    """A checkpoint's auto_map and processor_class name files that it does not bring along; return_dict=false would end
    the first step. The rest of the config is the user's."""
    model = copy(plain, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "configuration_x.XConfig"}, "return_dict": False, "output_attentions": True}
    config |= {"processor_class": "XProcessor", "output_router_logits": True}
    (model / "config.json").write_text(json.dumps(config))
    run(command(model, tmp_path / "out", "steps=1"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"auto_map", "processor_class"} & {*written}
    assert written["output_router_logits"] is True
    load_model(str(tmp_path / "out"))


@pytest.mark.parametrize("verb", ["train", "eval", "init"])
def test_a_tokenizer_with_code_of_its_own_is_refused_as_in_conversion(verb, plain, corpus, command, tmp_path, capsys):
    model = copy(plain, tmp_path / "model")
    settings = model / "tokenizer_config.json"
    named = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **named}))
    own = command(model, tmp_path / "out", "steps=1")
    arguments = {"train": own, "eval": ["eval", str(model), f"data={corpus}", "sequence_length=32"]}
    arguments["init"] = ["init", str(model), str(tmp_path / "out")]
    capsys.readouterr()
    assert main(arguments[verb]) == 2
    told = capsys.readouterr().err
    assert f"{settings}: the tokenizer needs code of its own (auto_map: tokenization_own.OwnTokenizer)" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "tokenizer.json"])
def test_a_link_out_of_the_source_is_not_carried(name, plain, command, tmp_path, capsys):
    """The target of the link would be published with the output."""
    model = copy(plain, tmp_path / "model")
    outside = tmp_path / "outside"
    outside.write_text("precious")
    if (model / name).exists():
        (model / name).rename(outside)
    (model / name).symlink_to(outside)
    assert main(command(model, tmp_path / "out", "steps=1")) == 2
    told = capsys.readouterr().err
    assert f"{model / name} is a link to {outside}, outside of the source" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (model / name).unlink()
    outside.rename(model / name)
    run(command(model, tmp_path / "out", "steps=1"))
    assert (tmp_path / "out" / name).is_file()
