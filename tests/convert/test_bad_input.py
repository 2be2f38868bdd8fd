"""Bad input to `loopwise convert`: one clear line, exit 2, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, modeling_utils

from loopwise.cli import main
from loopwise.directory import is_ours
from tests.helpers.convert import refused
from tests.helpers.tiny import save_source


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    return save_source(tmp_path_factory.mktemp("mixture") / "qwen3_moe", "qwen3_moe")


def broken(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "broken"))


def earlier_output(out: Path) -> Path:
    """A directory with the record that Loopwise leaves, and a file `earlier`."""
    out.mkdir()
    (out / "loopwise.json").write_text('{"loopwise": "0.1.0"}')
    (out / "earlier").write_text("x")
    return out


def edit_config(path: Path, **fields: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_missing_directory(capsys, tmp_path):
    assert "no such directory" in refused(capsys, tmp_path, tmp_path / "none", tmp_path / "out", "sizes=1,2,1")
    assert "no such directory" in refused(capsys, tmp_path, "no/such-model", tmp_path / "out", "sizes=1,2,1")
    assert "no such file" in refused(capsys, tmp_path, tmp_path / "none.gguf", tmp_path / "out", "sizes=1,2,1")


def test_a_config_without_weights(capsys, tmp_path, source):
    path = broken(source, tmp_path)
    (path / "model.safetensors").unlink()
    assert "no weights" in refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")


def test_weights_without_a_config(capsys, tmp_path, source):
    path = broken(source, tmp_path)
    (path / "config.json").unlink()
    assert "no config.json" in refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_a_truncated_file(capsys, tmp_path, source, keep):
    path = broken(source, tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "truncated" in refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")


def test_a_missing_shard(capsys, tmp_path):
    path = save_source(tmp_path / "sharded", shard="100KB")
    shard = sorted(path.glob("model-*"))[1]
    shard.unlink()
    assert shard.name in refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_a_bad_index(capsys, tmp_path, source, index):
    path = broken(source, tmp_path)
    (path / "model.safetensors").rename(path / "other.safetensors")
    (path / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")


def test_a_pickle_only_checkpoint(capsys, tmp_path, source):
    path = broken(source, tmp_path)
    (path / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, path / "pytorch_model.bin")
    assert "pickled" in refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")


def test_loops_that_do_not_divide(capsys, tmp_path, source):
    line = refused(capsys, tmp_path, source, tmp_path / "out", "method=recursive", "loops=4")
    assert "loops=4" in line
    assert "6 layers" in line
    assert "1, 2, 3, 6" in line


def test_layers_out_of_range(capsys, tmp_path, source):
    line = refused(capsys, tmp_path, source, tmp_path / "out", "layers.core=[2,9]")
    assert "layer 9" in line
    assert "0 to 5" in line
    assert "6" in refused(capsys, tmp_path, source, tmp_path / "out", "sizes=3,3,3")


def test_an_unknown_key_names_the_nearest(capsys, tmp_path, source):
    line = refused(capsys, tmp_path, source, tmp_path / "out", "sizes=1,2,1", "num_recurences=3")
    assert "did you mean 'num_recurrences'" in line
    line = refused(capsys, tmp_path, source, tmp_path / "out", "layers.cor=[1]")
    assert "did you mean 'layers.core'" in line


def test_an_unsupported_architecture_lists_the_supported(capsys, tmp_path, source):
    path = broken(source, tmp_path)
    edit_config(path, model_type="t5")
    line = refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")
    assert "'t5'" in line
    assert "llama" in line
    assert "qwen3" in line


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("an expert", "4 x mlp.experts.*.gate_proj.weight [32, 64], 3 x mlp.experts.*.up_proj.weight [32, 64]"),
        ("all gates", "they have 4 x mlp.experts.*.up_proj.weight [32, 64], no mlp.experts.*.gate_proj.weight"),
        ("a shape", "1 x mlp.experts.*.gate_proj.weight [30, 64]"),
    ],
)
@pytest.mark.parametrize("more", [["workers=2"], ["--dry-run"]])
def test_experts_that_do_not_fit_together(kind, said, more, capsys, tmp_path, mixture):
    path = broken(mixture, tmp_path)
    file, experts = path / "model.safetensors", "model.layers.2.mlp.experts"
    tensors = load_file(file)
    if kind == "an expert":
        del tensors[f"{experts}.2.up_proj.weight"]
    for expert in range(4) if kind == "all gates" else ():
        del tensors[f"{experts}.{expert}.gate_proj.weight"]
    if kind == "a shape":
        tensors[f"{experts}.1.gate_proj.weight"] = torch.ones(30, 64)
    save_file(tensors, file, {"format": "pt"})
    line = refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,3,2", *more)
    assert f"the files do not make up {experts}.gate_up_proj of shape [4, 64, 64]" in line
    assert said in line


def test_a_full_output_needs_force(capsys, tmp_path, source):
    out = earlier_output(tmp_path / "out")
    assert "--force" in refused(capsys, tmp_path, source, out, "sizes=1,2,1")
    assert main(["convert", str(source), str(out), "sizes=1,2,1", "--force"]) == 0
    assert not (out / "earlier").exists()
    assert (out / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


RECIPE = "train_recipe.yaml"


@pytest.mark.parametrize(
    "files", [{"precious": "x"}, {"config.json": "{}", "model.safetensors": "x"}, {RECIPE: "steps: 3\n", "a": "x"}]
)
def test_force_replaces_nothing_but_what_loopwise_wrote(capsys, tmp_path, source, files):
    out = tmp_path / "out"
    out.mkdir()
    for name, text in files.items():
        (out / name).write_text(text)
    line = refused(capsys, tmp_path, source, out, "sizes=1,2,1", "--force")
    assert "no loopwise.json" in line
    assert "--force replaces only what Loopwise wrote" in line
    assert "--force" not in refused(capsys, tmp_path, source, out, "sizes=1,2,1")  # it would be refused
    assert {file.name: file.read_text() for file in out.iterdir()} == files


def test_force_replaces_a_run_that_wrote_no_model(tmp_path, source):
    out = tmp_path / "out"
    out.mkdir()
    (out / RECIPE).write_text("# loopwise 0.1.0: loopwise train a b\nsteps: 3\n")
    assert main(["convert", str(source), str(out), "sizes=1,2,1", "--force"]) == 0
    assert not (out / RECIPE).exists()


def test_failure_under_force_keeps_the_old_output(capsys, tmp_path, source):
    out = earlier_output(tmp_path / "out")
    path = broken(source, tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refused(capsys, tmp_path, path, out, "sizes=1,2,1", "--force")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["sizes=1,2"], "P,C,D"),
        (["sizes=4"], "P,C,D"),
        (["layers.core=1,x"], "layers.core"),
        (["sizes=1,0,1"], "at least one core layer"),
        (["sizes=a,b,c"], "sizes"),
        ([], "sizes=P,C,D"),
        (["sizes"], "key=value"),
        (["method=mix"], "method='mix'"),
        (["method=recursive"], "loops"),
        (["method=recursive", "loops=2", "sizes=1,2,1"], "sizes belongs to method=retrofit"),
        (["sizes=1,2,1", "loops=2"], "loops belongs to method=recursive"),
        (["sizes=1,2,1", "injection=none", "state_init=zeros"], "never shows the input"),
        (["sizes=1,2,1", "num_recurrences=0"], "num_recurrences=0"),
        (["sizes=1,2,1", "num_recurrences=9", "max_recurrences=4"], "max_recurrences=4"),
        (["sizes=1,2,1", "revision=main"], "revision"),
        (["sizes=1,2,1", "dtype=int8"], "dtype='int8'"),
        (["sizes=1,2,1", "num_recurrences=2.0"], "num_recurrences=2.0"),
        (["sizes=1,2,1", "num_recurrences=true"], "num_recurrences=True"),
        (["sizes=1,2,true"], "sizes"),
        (["sizes=1,2,1", "state_init=normal", "state_std=.inf"], "state_std=inf"),
        (["sizes=1,2,1", "state_init=normal", "state_std=true"], "state_std=True"),
        (["sizes=1,2,1", "seed=9223372036854775808"], "seed=9223372036854775808"),
        (["sizes=1,2,1", "revision=0123456"], "revision='0123456'"),
        (["sizes=1,2,1", "state_init=normal", "state_std=1e39"], "not finite"),
        (["method=recursive", "loops=3", "sharing=middle-cycle"], "4 layers between the first and the last"),
        (["method=universal", "loops=2"], "leave loops out"),
        (["method=universal", "sizes=1,2,1"], "sizes belongs to method=retrofit"),
        (["sizes=1,2,1", "halting=pondernet"], "halting='pondernet'"),
        (["sizes=1,2,1", "halting=act", "router.kind=token"], "a router goes with no recurrence_residual"),
        (["method=recursive", "loops=2", "sharing=sequence", "halting=act"], "halting cannot"),
        (["sizes=1,2,1", "influence=/nowhere.txt"], "No such file"),
        (["layers.core=1", "influence=/nowhere.txt"], "leave one out"),
        (["sizes=1,2,1", "sharing=sequence"], "sharing belongs to method=recursive"),
        (["method=recursive", "loops=2", "sharing=sequence", "injection=linear"], "nothing can stand between"),
        (["method=recursive", "loops=2", "lora.rank=65"], "above the rank of self_attn.q_proj"),
        (["method=recursive", "loops=2", "lora.rank=0"], "lora.rank=0: an integer above 0"),
        (["method=recursive", "loops=2", "lora.rank={x: 4}"], "one for each target of q, k, v"),
        (["method=recursive", "loops=2", "lora.rnk=4"], "unknown recipe key 'lora.rnk': did you mean 'lora.rank'?"),
        (["method=recursive", "loops=2", "lora.rank={}"], "one for each target of q, k, v"),
        (["method=recursive", "loops=2", "lora.rank=4", "lora.targets=[]"], "lora.targets=[]"),
        (["method=mor", "loops=2", "router.thresholds=[-0.1,1]"], "router.thresholds=-0.1"),
        (["sizes=1,2,1", "exit.rule=gate"], "no exit gate"),
        (["sizes=1,2,1", "num_recurrences=99999999999999999999"], "less than or equal to 4096"),
        (["method=recursive", "loops=2", "lora.rank=4", "lora.targets=q,x"], "lora.targets"),
        (["method=recursive", "loops=2", "lora.rank={q: 4}", "lora.targets=q"], "rank names its targets"),
        (["method=recursive", "loops=2", "lora.rank=4", "lora.init=svd", "init=random"], "noise"),
        (["sizes=1,2,1", "lora.rank=4", "lora.init=svd"], "retrofit ties no two layers"),
        (["sizes=1,2,1", "injection=gated", "state_init=zeros"], "only from state_init=input"),
    ],
)
def test_settings(capsys, tmp_path, source, settings, said):
    assert said in refused(capsys, tmp_path, source, tmp_path / "out", *settings)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (["lora.rank=2"], "none of the matrices q, k, v, o, gate, up, down is in every layer of the core"),
        (["lora.rank=2", "lora.targets=q"], "lora target 'q': not every layer of the core has such a matrix"),
    ],
)
def test_layers_without_a_matrix_in_common_have_no_lora(capsys, tmp_path, lora, said):
    """A layer of Nemotron-H is attention, or an MLP, or a state space model."""
    source = save_source(tmp_path / "source", "nemotron_h")
    assert said in refused(capsys, tmp_path, source, tmp_path / "out", "sizes=1,3,2", *lora)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": "recurrent_depth"}, "already"),
        ({"model_type": "my_own", "auto_map": {"AutoConfig": "x.Y"}}, "remote code"),
        ({"hidden_size": 128, "head_dim": 32}, "shape"),
        ({"num_hidden_layers": 7}, "has 7 layers, and the weights have 6"),
        ({"num_hidden_layers": 5}, "save_pretrained it, which drops it"),
        ({"num_hidden_layers": -1}, "config.json"),
        ({"hidden_act": "magic"}, "magic"),
        ({"rope_parameters": {"rope_type": "magic", "rope_theta": 1e4}}, "magic"),
        ({"num_attention_heads": "two"}, "num_attention_heads"),
    ],
)
def test_sources(capsys, tmp_path, source, fields, said):
    path = broken(source, tmp_path)
    edit_config(path, **fields)
    assert said in refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")


def test_adapters_and_files(capsys, tmp_path, source):
    path = broken(source, tmp_path)
    (path / "adapter_config.json").write_text("{}")
    assert "merge" in refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")
    (path / "config.json").unlink()  # an adapter's own directory has none
    assert "merge" in refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")
    assert "is a file" in refused(capsys, tmp_path, source / "config.json", tmp_path / "out", "sizes=1,2,1")


def test_the_output_may_not_lie_in_the_source(capsys, source):
    assert "lies in the source" in refused(capsys, source, source, source / "out", "sizes=1,2,1")
    assert "lies in the source" in refused(capsys, source, source, source, "sizes=1,2,1", "--force")
    assert "holds the source" in refused(capsys, source, source, source.parent, "sizes=1,2,1", "--force")


def test_outputs_that_would_replace_too_much(capsys, tmp_path, source, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for out in (".", "", here, ".."):
        assert "error: " in refused(capsys, tmp_path, source, out, "sizes=1,2,1", "--force")
    (tmp_path / "loop").symlink_to("loop")
    for out in ("x" * 245, "x" * 300, "a\0b", "loop"):
        assert "cannot write" in refused(capsys, tmp_path, source, tmp_path / out, "sizes=1,2,1")
    assert "too long" in refused(capsys, tmp_path, tmp_path / ("x" * 300), tmp_path / "out", "sizes=1,2,1")
    assert "SOURCE is empty" in refused(capsys, tmp_path, "", "out", "sizes=1,2,1")


def test_a_link_to_a_directory_stays_a_link(tmp_path, source):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    for force in ([], ["--force"]):
        assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1", *force]) == 0
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out"]


@pytest.mark.parametrize("again", [False, True])
def test_interrupted_between_the_renames_the_old_output_is_kept(tmp_path, source, monkeypatch, again):
    out, rename = earlier_output(tmp_path / "out"), Path.rename
    if again:  # killed there: the next call puts it back, though that call fails too
        out.rename(tmp_path / ".out.old-999999999")

    def interrupted(self: Path, target: Path) -> Path:
        if "partial" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    assert main(["convert", str(source), str(out), "sizes=1,2,1", "--force"]) == 130
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["earlier", "loopwise.json", "out"]


def test_only_what_is_ours_is_removed_beside_the_output(tmp_path, source):
    kept = {".out.old-999999999": "precious", ".out.old-mine": "loopwise.json", ".out.partial-mine": "loopwise.json"}
    kept |= {".out.partial-999999999": "precious"}
    kept |= {".out.partial-999999996": "loopwise.json"}  # of an earlier release, which took no lock
    ended = "999999998-0123456789ab"
    gone = {f".out.old-{ended}": "loopwise.json", f".out.partial-{ended}": "loopwise.json"}
    for name, file in {**kept, **gone}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text('{"loopwise": "0.1.0"}')
    (tmp_path / ".out.partial-999999997").symlink_to(tmp_path / ".out.partial-mine")
    kept |= {".out.partial-999999997": "loopwise.json"}
    assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1", "--force"]) == 0
    # The first of the two numbered ones was put back where nothing stood, and replaced as it is ours.
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "out"])


def test_what_is_being_made_has_a_record_from_the_start(tmp_path, source, monkeypatch):
    """So that the next call may remove what a killed one left, and nothing that looks like it."""
    import loopwise.convert.conversion as conversion

    def killed(config, directory):
        assert is_ours(directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "save_config", killed)
    assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1"]) == 130
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("standing", ["theirs", "ours", "in the source", "below a file"])
def test_a_dry_run_says_what_would_refuse_the_output(standing, capsys, tmp_path, source):
    out, message = (
        tmp_path / "out",
        {
            "theirs": "out is not empty; choose another directory",
            "ours": "replace it with --force",
            "in the source": "lies in the source",
            "below a file": "that is no directory",
        }[standing],
    )
    if standing == "ours":
        earlier_output(out)
    elif standing == "theirs":
        out.mkdir()
        (out / "precious").touch()
    elif standing == "in the source":
        out = source / "out"
    else:
        (tmp_path / "file").touch()
        out = tmp_path / "file" / "out"
    assert main(["convert", str(source), str(out), "sizes=1,2,1", "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_what_a_killed_call_left_is_put_back_before_force_is_asked_for(capsys, tmp_path, source):
    earlier_output(tmp_path / "out").rename(tmp_path / ".out.old-999999999")
    assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["earlier", "loopwise.json", "out"]


@pytest.mark.parametrize(
    ("verb", "file"),
    [(verb, "tokenizer.json") for verb in ("init", "convert", "export", "train")]
    + [(verb, "model.safetensors") for verb in ("init", "train")],
)
def test_a_disk_that_fills_in_a_library_in_rust_is_one_line(verb, file, tmp_path, source, monkeypatch, capsys):
    """tokenizers raises a bare Exception, safetensors one of its own; convert and export write weights themselves."""
    model = source
    if verb in ("export", "train"):
        model = tmp_path / "model"
        assert main(["convert", str(source), str(model), "method=recursive", "loops=2", "--no-verify"]) == 0
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 100)
    before = sorted(tmp_path.iterdir())
    error = Exception if file == "tokenizer.json" else SafetensorError

    def full(*given: object, **named: object) -> None:
        raise error("Error while serializing: I/O error: No space left on device (os error 28)")

    if file == "tokenizer.json":
        monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    else:
        monkeypatch.setattr(modeling_utils, "safe_save_file", full)
    options = {
        "init": [],
        "convert": ["sizes=1,2,1"],
        "export": ["--unroll", "2"],
        "train": [f"data.train={tmp_path / 'text.txt'}", "steps=1", "data.sequence_length=8"],
    }[verb]
    capsys.readouterr()
    assert main([verb, str(model), str(tmp_path / "out"), *options]) == 2
    told = capsys.readouterr().err.splitlines()
    assert "No space left on device" in told[-1]
    assert told[-1].startswith("loopwise: error: ")
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_only_named_as_a_killed_call_s_stays_where_it_is(tmp_path, source):
    (tmp_path / ".out.old-999999999").mkdir()
    (tmp_path / ".out.old-999999999" / "precious").write_text("x")
    (tmp_path / ".out.old-999999998").symlink_to(earlier_output(tmp_path / "mine"))
    beside = sorted(tmp_path.iterdir())
    assert main(["train", str(tmp_path / "nothing"), str(tmp_path / "out"), "data.train=nothing", "steps=1"]) == 2
    assert sorted(tmp_path.iterdir()) == beside
    assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1", "--no-verify"]) == 0
    assert sorted(tmp_path.iterdir()) == [*beside, tmp_path / "out"]


def test_a_source_file_that_cannot_be_read_again(capsys, tmp_path, source, monkeypatch):
    import loopwise.convert.conversion as conversion

    hashing = conversion.hashing
    monkeypatch.setattr(conversion, "hashing", lambda files: hashing([*files, tmp_path / "gone"]))
    line = refused(capsys, tmp_path, source, tmp_path / "out", "sizes=1,2,1")
    assert "gone cannot be read" in line


def test_tensors_of_other_types(capsys, tmp_path, source):

    path = broken(source, tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, path / "model.safetensors")
    line = refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")
    assert "model.norm.weight has type I32" in line
    assert "BF16" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(capsys, tmp_path, source, value, dtype):

    path = broken(source, tmp_path)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path / "model.safetensors").items()}
    tensors["model.layers.4.mlp.up_proj.weight"][5, 7] = value
    save_file(tensors, path / "model.safetensors")
    line = refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")
    assert "model.layers.4.mlp.up_proj.weight has values that are not finite" in line


@pytest.mark.parametrize("method", [["sizes=1,2,1"], ["method=recursive", "loops=2", "init=average"]])
def test_a_value_beyond_the_range_of_the_dtype(capsys, tmp_path, source, method):
    from safetensors.torch import load_file, save_file

    path = broken(source, tmp_path)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path / "model.safetensors").items()}
    for layer in (0, 3):  # the average of both is as large
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"][0, 0] = -1e5
    save_file(tensors, path / "model.safetensors")
    line = refused(capsys, tmp_path, path, tmp_path / "out", *method, "dtype=float16")
    assert "model.layers.0.mlp.up_proj.weight has a value of -99840, and float16 ends at 65504" in line
    assert "use dtype=bfloat16 or dtype=float32" in line
    assert main(["convert", str(path), str(tmp_path / "out"), *method]) == 0


def test_gpt2_scaled_by_the_place_of_a_layer(capsys, tmp_path):
    path = save_source(tmp_path / "gpt2", "gpt2", scale_attn_by_inverse_layer_idx=True)
    assert "scale_attn_by_inverse_layer_idx" in refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")


def test_tying_different_attention_types_is_refused(capsys, tmp_path):
    path = save_source(tmp_path / "gemma", "gemma3_text")
    line = refused(capsys, tmp_path, path, tmp_path / "out", "method=recursive", "loops=3")
    assert "different attention types" in line
    assert main(["convert", str(path), str(tmp_path / "out"), "method=recursive", "loops=2"]) == 0


def test_a_dry_run_writes_nothing(capsys, tmp_path, source):
    assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "core     3 4" in printed
    assert "dropped  [1, 2]" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM, signal.SIGKILL])
def test_a_killed_convert_leaves_no_output(tmp_path, source, kind):
    """Killed while it writes: OUT does not exist, and the next convert removes what lies beside it."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a background job starts without
        "def slow(*args):\n    print('writing', flush=True)\n    time.sleep(60)\n"
        "import loopwise.convert.conversion as conversion\nconversion.write_weights = slow\n"
        "from loopwise.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    argv = ["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1"]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ.copy()
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    time.sleep(0.2)
    child.send_signal(kind)
    _, err = child.communicate(timeout=30)
    assert not (tmp_path / "out").exists()
    if kind == signal.SIGINT:
        assert child.returncode == 130
        assert err.decode().strip() == "loopwise: interrupted"
    if kind == signal.SIGTERM:
        assert child.returncode == 128 + signal.SIGTERM
        assert err == b""
    if kind != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []
    assert main(argv) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_named(capsys, tmp_path, source, monkeypatch):
    from loopwise.convert import conversion

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_weights", full)
    assert "No space left" in refused(capsys, tmp_path, source, tmp_path / "out", "sizes=1,2,1")


def test_verification_can_fail(capsys, tmp_path, source, monkeypatch):
    from loopwise.convert import tensors

    monkeypatch.setattr(tensors, "_mean", lambda weights, names, device: weights.read(names[0]) * 1.01)
    assert "verification failed" in refused(capsys, tmp_path, source, tmp_path / "out", "sizes=1,2,1")
    assert main(["convert", str(source), str(tmp_path / "out"), "sizes=1,2,1", "--no-verify"]) == 0
    assert "Not verified" in (tmp_path / "out" / "README.md").read_text()
