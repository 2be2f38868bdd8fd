"""`method=fold`: layers that a source has several times, as RYS models and self-merges do, and the way back."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loopwise.cli import main
from loopwise.convert import conversion, convert_checkpoint, worker
from loopwise.convert.repeats import find_blocks
from loopwise.convert.shards import Done
from loopwise.convert.workers import Job
from tests.helpers.convert import change_fields, import_refused, run, tokens
from tests.helpers.tiny import save_source, source_model, tokenizer

SELF_MERGE = [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]  # layers 2 and 3 three times


def save_merge(folder: Path, model_type: str, order: list[int], shard: str = "5GB") -> Any:
    """A checkpoint of the layers `order` of a tiny model, each with tensors of its own on disk; the model."""
    layers = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    merged, small = source_model(model_type, **{layers: len(order)}), source_model(model_type, seed=7)
    prefix = "transformer.h" if model_type == "gpt2" else "model.layers"
    for n, layer in enumerate(order):
        merged.get_submodule(f"{prefix}.{n}").load_state_dict(small.get_submodule(f"{prefix}.{layer}").state_dict())
    merged.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return merged.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("model_type", "shard"), [("llama", "5GB"), ("gpt2", "5GB"), ("qwen3", "100KB")])
def test_a_merge_is_folded_and_unrolled_again(model_type, shard, tmp_path, capsys):
    source, out, plain = tmp_path / "source", tmp_path / "out", tmp_path / "plain"
    merge = save_merge(source, model_type, SELF_MERGE, shard)
    assert len(list(source.glob("*.safetensors"))) > 1 or shard == "5GB"
    assert main(["convert", str(source), str(out), "method=fold"]) == 0
    assert "note: layers 2 to 3 come 3 times in a row, up to layer 7: folded\n" in capsys.readouterr().out
    facts = json.loads((out / "loopwise.json").read_text())
    assert facts["max_dlogit_by_dtype"] == {"float32": 0}
    assert facts["plan"]["dropped"] == []
    assert facts["parameters"]["unique"] < facts["parameters"]["source"] * 0.75
    model: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    parts = (model.config.prelude, model.config.core, model.config.coda)
    assert (*parts, model.config.num_recurrences, model.config.injection) == ([0, 1], [2, 3], [8, 9], 3, "none")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        assert torch.equal(model(**tokens()).logits, merge(**tokens()).logits)
        assert torch.equal(model.generate(**tokens(), **options), merge.generate(**tokens(), **options))
    assert main(["export", str(out), str(plain), "--unroll", "3"]) == 0
    found, want = tensors(plain), tensors(source)
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (plain, source)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "ernie4_5_moe"])
def test_experts_are_unrolled_by_their_published_names(model_type, tmp_path):
    """One by one, as readers other than transformers know them; it has all experts of a layer in one tensor."""
    source, out, plain = tmp_path / "source", tmp_path / "out", tmp_path / "plain"
    save_merge(source, model_type, [0, 1, 2, 1, 2, 3])
    assert main(["convert", str(source), str(out), "method=fold", "--no-verify"]) == 0
    assert main(["export", str(out), str(plain), "--unroll", "2"]) == 0
    found, want = tensors(plain), tensors(source)
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in want
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())


def test_no_worker_compares_layers_again(monkeypatch, tmp_path):
    """Nor tied weights, which the files may hold twice."""
    save_merge(tmp_path / "source", "llama", SELF_MERGE)
    stored = load_file(tmp_path / "source" / "model.safetensors")
    head = stored["model.embed_tokens.weight"] + 1
    save_file({**stored, "lm_head.weight": head}, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    change_fields(tmp_path / "source", tie_word_embeddings=True)

    def work(job: Job, todo: list[int]) -> Any:
        """A worker in this process, which cannot compare."""
        replies: list[dict[str, Any]] = []
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO("".join(f"{number}\n" for number in todo)))
            patch.setattr(convert_checkpoint, "equal_layers", None)
            patch.setattr(torch, "equal", None)
            worker._work(json.loads(json.dumps(job.message())), lambda **reply: replies.append(reply))
        assert replies[0] == {"ready": True}
        yield from ((reply["unit"], Done(reply["checksums"], reply["error"])) for reply in replies[1:])

    monkeypatch.setattr(conversion, "work", work)
    for name, more in (("one", []), ("two", ["workers=2"])):
        argv = ["convert", str(tmp_path / "source"), str(tmp_path / name), "method=fold", "--no-verify"]
        assert main([*argv, *more]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert torch.equal(tensors(tmp_path / "two")["source.lm_head.weight"], head)


def test_repeated_layers_are_noticed_by_every_method(tmp_path, capsys):
    save_merge(tmp_path / "source", "llama", SELF_MERGE)
    line = "note: layers 2 to 3 come 3 times in a row, up to layer 7; method=fold shares their weights and computes"
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "out"), "sizes=2,6,2", "--dry-run"]) == 0
    assert line in capsys.readouterr().out
    line = import_refused(capsys, tmp_path / "source", tmp_path / "out")
    assert "or method=fold, as some of its layers repeat" in line
    save_source(tmp_path / "other")
    assert main(["convert", str(tmp_path / "other"), str(tmp_path / "out"), "sizes=1,3,2", "--dry-run"]) == 0
    assert "note: layer" not in capsys.readouterr().out
    assert "method=fold" not in import_refused(capsys, tmp_path / "other", tmp_path / "out")


def test_layers_in_a_row_and_what_one_core_cannot_hold(tmp_path, capsys):
    """Layers 1, 2, 3, each twice, as in SOLAR's kind of merge; then layer 4 twice, which stays, and layer 1 again."""
    merge = save_merge(tmp_path / "source", "llama", [0, 1, 1, 2, 2, 3, 3, 0, 4, 4, 5])
    model = run(tmp_path / "source", tmp_path / "out", method="fold")
    assert (model.config.core, model.config.sharing, model.config.coda) == ([1, 3, 5], "sequence", [7, 8, 9, 10])
    (first,) = json.loads((tmp_path / "out" / "loopwise.json").read_text())["notes"][:1]
    assert first.startswith("layers 1 to 6 are 3 layers, each 2 times in a row: folded; layers [7, 9] equal others")
    with torch.no_grad():
        assert torch.equal(model(**tokens()).logits, merge(**tokens()).logits)


def test_without_a_block_that_repeats_it_is_refused(tmp_path, capsys):
    source, out = save_source(tmp_path / "plain"), tmp_path / "out"
    line = import_refused(capsys, source, out, "method=fold")
    assert "nothing repeats among the 6 layers of this llama (no two are equal)" in line
    save_merge(tmp_path / "apart", "llama", [0, 1, 2, 0])
    line = import_refused(capsys, tmp_path / "apart", out, "method=fold")
    assert "layers [3] equal earlier ones, but no block comes twice in a row" in line
    line = import_refused(capsys, source, out, "method=fold", "injection=linear")
    assert "method=fold shares equal layers and changes nothing else: leave out injection" in line


def test_one_bit_and_one_window_tell_layers_apart(tmp_path, capsys):
    save_merge(tmp_path / "source", "llama", [0, 1, 1, 2])
    file = tmp_path / "source" / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = int.from_bytes(data[:8], "little")
    at = json.loads(data[8 : 8 + start])["model.layers.2.mlp.down_proj.weight"]["data_offsets"][1]
    data[8 + start + at - 4] ^= 1  # the lowest bit of the last value
    file.write_bytes(data)
    assert "no two are equal" in import_refused(capsys, tmp_path / "source", tmp_path / "out", "method=fold")
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    model = source_model("qwen3", num_hidden_layers=2, **windows)
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    model.save_pretrained(tmp_path / "windows")
    assert "no two are equal" in import_refused(capsys, tmp_path / "windows", tmp_path / "out", "method=fold")


@pytest.mark.parametrize(
    ("same", "blocks"),
    [
        ([0, 1, 2], []),
        ([0, 0, 0, 0], ["layer 0 comes 4 times in a row, up to layer 3"]),
        (
            [0, 1, 0, 1, 4, 4],
            [
                "layers 0 to 1 come 2 times in a row, up to layer 3",
                "layer 4 comes 2 times in a row, up to layer 5",
            ],
        ),
        ([0, 0, 2, 2], ["layers 0 to 3 are 2 layers, each 2 times in a row"]),
        ([0, 1, 2, 0, 1], []),
        ([0, 1, 2, 1, 2, 2], ["layers 1 to 2 come 2 times in a row, up to layer 4"]),
    ],
)
def test_blocks(same, blocks):
    assert [str(block) for block in find_blocks(same)] == blocks
