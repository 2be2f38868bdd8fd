"""GGUF sources: equal to transformers' dequantised model and to the model that was written; one line for bad files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loopwise.card import read_metadata
from loopwise.cli import main
from loopwise.convert.source import SourceWeights
from loopwise.convert.source_config import empty_model, read_source
from loopwise.gguf_source import unpacked
from loopwise.train.pretrained import load_model
from tests.helpers.convert import refused, tokens
from tests.helpers.gguf_files import CHAT, FAMILIES, family_model, write_gguf
from tests.helpers.hub import ask, serving
from tests.helpers.tiny import VOCAB, attention

EVERY_LAYER = ("sizes=1,3,2", "injection=none", "num_recurrences=1")
TEXT = "the cat sat\n\n  on 12345 Größe 漢字 🎉 <s></s><pad> f(x): +1"
DEQUANTISED = [kind.name for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits]


def oracle(file: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers' own reader makes it."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, attn_implementation=attention(config)
    ).eval()


def logits(model: Any) -> torch.Tensor:
    ids = tokens()
    with torch.no_grad():
        return model(**ids, use_cache=False).logits[ids["attention_mask"].bool()]


def read(file: Path) -> Any:
    """The source model of the file, as a conversion reads it."""
    with unpacked(file) as directory:
        config = read_source(directory).config
        with torch.device("meta"):
            empty = empty_model(config)
        with SourceWeights(directory, empty) as weights:
            values = {name: weights.read(name) for name in weights.names()}
        assert {tensor.dtype for tensor in values.values()} == {torch.float32}
        model = empty_model(config).eval()
        absent = model.load_state_dict(values, strict=False).missing_keys
        assert set(absent) == set(model.all_tied_weights_keys) - set(values)
        return model


def assert_reads_as(file: Path, wanted: Any) -> None:
    """By a conversion, and by `loopwise eval`."""
    with unpacked(file) as directory:
        loaded = load_model(str(directory))
    values = wanted.state_dict()
    for found in (read(file).state_dict(), loaded.state_dict()):
        assert found.keys() == values.keys()
        assert [name for name in found if not torch.equal(found[name], values[name])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_as_transformers_reads_it(family, tmp_path):
    """Weights, config, token ids and chat template; bit for bit, and converted in bfloat16 too."""
    file = write_gguf(tmp_path / "model.gguf", family_model(family), family, ["Q8_0", "F16", "BF16", "Q4_0", "F32"])
    assert_reads_as(file, oracle(file))
    assert main(["convert", str(file), str(tmp_path / "out"), *EVERY_LAYER, "dtype=bfloat16"]) == 0
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    # In float32: kernels of bfloat16 round by how a matrix lies in memory.
    assert torch.equal(logits(made.float()), logits(torch.nn.Module.float(oracle(file, torch.bfloat16))))
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    wanted = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert found(TEXT)["input_ids"] == wanted(TEXT)["input_ids"]
    assert found.chat_template == wanted.chat_template == CHAT
    assert (made.generation_config.eos_token_id, made.generation_config.pad_token_id) == (1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float_file_is_the_model_that_was_written(family, tmp_path):
    """Its logits, so that nothing of the config is lost on the way either."""
    model = family_model(family)
    file = write_gguf(tmp_path / "model.gguf", model, family)
    made = read(file)
    if family.startswith("gemma"):  # w + 1 - 1 is rounded
        assert (logits(made) - logits(model)).abs().max() < 1e-4
    else:
        assert torch.equal(logits(made), logits(model))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt2", {"n_positions": 64}),
        ("qwen3", {"head_dim": 32}),
        ("gemma2", {"num_hidden_layers": 46, "query_pre_attn_scalar": 32}),  # 27B: hidden_size / heads
        ("gemma3", {"head_dim": 32, "query_pre_attn_scalar": 32}),
    ],
)
def test_what_transformers_reader_leaves_at_its_defaults_is_read(family, fields, tmp_path):
    model = family_model(family, **fields)
    file = write_gguf(tmp_path / "model.gguf", model, family)
    assert (logits(read(file)) - logits(model)).abs().max() < 1e-4


def rope_tensors(file: Path, model: Any, family: str, **tensors: list[float]) -> Path:
    """The file of `model` with more tensors: their names with `_weight`."""
    original = gguf.GGUFWriter.write_header_to_file

    def write(writer: gguf.GGUFWriter, *arguments: Any) -> None:
        for name, values in tensors.items():
            writer.add_tensor(name.replace("_weight", ".weight"), np.array(values, np.float32))
        original(writer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", write)
        return write_gguf(file, model, family, metadata=model.gguf_metadata)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def llama3_factors(width: int, theta: float) -> list[float]:
    """As llama.cpp's converter writes them."""
    found = []
    for frequency in (1.0 / theta ** (torch.arange(0, width, 2).double() / width)).tolist():
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / (4 - 1)
        found.append(1.0 if wavelength < 2048 else 8.0 if wavelength > 8192 else 1 / ((1 - smooth) / 8 + smooth))
    return found


@pytest.mark.parametrize("case", ["llama3", "linear", "yarn", "longrope", "partial"])
def test_rotary_scaling_is_kept(case, tmp_path):
    """transformers' reader leaves it out, and would make another model of the file."""
    family, scaling, extra, stored = "llama", dict[str, Any](), dict[str, Any](), dict[str, list[float]]()
    metadata: dict[str, Any] = {}
    if case == "llama3":
        scaling = {**LLAMA3, "rope_theta": 500000.0}
        stored = {"rope_freqs_weight": llama3_factors(32, 500000.0)}
    elif case in ("linear", "yarn"):
        family, scaling = "qwen2", {"rope_type": case, "factor": 4.0, "rope_theta": 10000.0}
        metadata = {"qwen2.rope.scaling.type": case, "qwen2.rope.scaling.factor": 4.0}
        if case == "yarn":
            scaling["original_max_position_embeddings"] = 32
            metadata["qwen2.rope.scaling.original_context_length"] = 32
    elif case == "longrope":
        family = "phi3"
        stored = {"rope_factors_short_weight": [1.5] * 16, "rope_factors_long_weight": [1.0 + n / 4 for n in range(16)]}
        extra["original_max_position_embeddings"] = 8
        metadata["phi3.rope.scaling.original_context_length"] = 8
        scaling = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": stored["rope_factors_short_weight"]}
        scaling["long_factor"] = stored["rope_factors_long_weight"]
    else:
        family, scaling = "phi3", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        metadata["phi3.rope.dimension_count"] = 16
    model = family_model(family, rope_parameters=scaling, **extra)
    model.gguf_metadata = metadata
    file = rope_tensors(tmp_path / "model.gguf", model, family, **stored)
    found, wanted = logits(read(file)), logits(model)
    assert (found - wanted).abs().max() < 1e-4
    plain = {**scaling, "rope_type": "default", "partial_rotary_factor": 1.0}
    assert (logits(family_model(family, rope_parameters=plain)) - wanted).abs().max() > 1e-3


def test_every_type_of_block_is_dequantised(tmp_path):
    model = family_model("llama", hidden_size=256, num_attention_heads=8, intermediate_size=256)
    assert len(DEQUANTISED) > 20
    file = write_gguf(tmp_path / "model.gguf", model, "llama", DEQUANTISED)
    assert_reads_as(file, oracle(file))


@pytest.mark.parametrize(
    "settings",
    [
        ("sizes=2,2,1", "dtype=float16"),
        ("method=recursive", "loops=2", "lora.rank=8"),
        ("method=mor", "loops=2", "lora.rank=4"),
        ("sizes=1,2,1", "influence={text}"),
    ],
)
def test_every_method_takes_it(settings, tmp_path, capsys):
    """Verified against the source's layers, with the file's hash and the bos that the file asks for."""
    import hashlib
    import json

    file = write_gguf(
        tmp_path / "m.gguf", family_model("llama"), "llama", "Q8_0", {"tokenizer.ggml.add_bos_token": True}
    )
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 100)
    keys = [setting.format(text=text) for setting in settings]
    assert main(["convert", str(file), str(tmp_path / "out"), *keys, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(file), str(tmp_path / "out"), *keys]) == 0
    assert "verified" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "loopwise.json").read_text())
    assert facts["source"] == {
        "id": str(file),
        "revision": None,
        "sha256": {"m.gguf": hashlib.sha256(file.read_bytes()).hexdigest()},
    }
    assert "base_model" not in (tmp_path / "out" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat")["input_ids"][0] == 0
    assert not list((tmp_path / "out").glob("*.gguf"))


@pytest.mark.parametrize(
    ("metadata", "ends"),
    [
        ({}, 1),
        ({"eot_token_id": 1}, 1),
        ({"eot_token_id": 7}, [1, 7]),
        ({"eot_token_id": 7, "eom_token_id": 9}, [1, 7, 9]),
        ({"eot_token_id": 2**32 - 1}, 1),  # llama.cpp's -1: none
        ({"<end_of_turn>": VOCAB - 1}, [1, VOCAB - 1]),  # which files of Gemma name by no key
        ({"<|im_end|>": 1}, 1),
        ({"eot_token_id": VOCAB - 1, "<|eot_id|>": VOCAB - 1, "<|eom_id|>": VOCAB - 2}, [1, VOCAB - 1, VOCAB - 2]),
    ],
)
def test_a_turn_ends_a_text_too(metadata, ends, tmp_path):
    """An instruct model ends its turn with another token than its eos: generate and serve stop at both."""
    keys = {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if key.endswith("_id")}
    names = {value: key for key, value in metadata.items() if not key.endswith("_id")}
    file = write_gguf(tmp_path / "model.gguf", family_model("llama"), "llama", metadata=keys, names=names)
    assert main(["convert", str(file), str(tmp_path / "out"), *EVERY_LAYER, "--no-verify"]) == 0
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert made.generation_config.eos_token_id == ends
    assert made.config.eos_token_id == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 1


def test_more_embeddings_than_tokens(tmp_path):
    model = family_model("llama", vocab_size=350)
    file = write_gguf(tmp_path / "model.gguf", model, "llama", metadata={"llama.vocab_size": 350})
    assert_reads_as(file, oracle(file))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", family_model("llama"), "llama", "Q8_0")


def test_a_directory_with_one(file, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(file.read_bytes())
    assert main(["convert", str(folder), str(tmp_path / "out"), "sizes=1,2,1"]) == 0
    capsys.readouterr()
    (folder / "b.gguf").write_bytes(file.read_bytes())
    line = refused(capsys, tmp_path, folder, tmp_path / "two", "sizes=1,2,1")
    assert "2 GGUF files (a.gguf, b.gguf)" in line
    assert str(folder / "a.gguf") in line


@pytest.mark.parametrize("name", ["sha256-abc", "m.bin", "m.GGUF"])
def test_a_file_of_another_name(name, file, tmp_path):
    """Caches name files by hashes."""
    shutil.copy(file, tmp_path / name)
    assert main(["convert", str(tmp_path / name), str(tmp_path / "out"), "sizes=1,2,1"]) == 0


def test_the_output_may_lie_beside_the_file_but_not_around_it(tmp_path, file, capsys):
    own = tmp_path / "models" / "own.gguf"
    own.parent.mkdir()
    own.write_bytes(file.read_bytes())
    assert main(["convert", str(own), str(own.parent / "out"), "sizes=1,2,1", "--no-verify"]) == 0
    capsys.readouterr()
    assert "holds the source" in refused(capsys, tmp_path, own, own.parent, "sizes=1,2,1", "--force")


def edited(file: Path, path: Path, *edits: tuple[bytes, bytes]) -> Path:
    content = file.read_bytes()
    for old, new in edits:
        assert content.count(old) >= 1
        content = content.replace(old, new, 1)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("keep", [0, 3, 20, 1000, -1, -100_000])
def test_a_truncated_file(keep, file, tmp_path, capsys):
    path = tmp_path / "model.gguf"
    path.write_bytes(file.read_bytes()[:keep])
    line = refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")
    assert str(path) in line
    assert "truncated" in line or "not a GGUF file" in line


def big_endian(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_what_is_no_supported_model_is_one_line(file, tmp_path, capsys):
    def line(path: Path) -> str:
        return refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")

    path = tmp_path / "model.gguf"
    big_endian(path)
    assert "big-endian" in line(path)
    path.write_bytes(b"PK\x03\x04" + file.read_bytes()[4:])
    assert "not a GGUF file" in line(path)
    (tmp_path / "notes.txt").write_text("x")
    assert "no GGUF" in line(tmp_path / "notes.txt")
    edited(file, path, (b"GGUF\x03", b"GGUF\x09"))
    assert "version 9" in line(path)
    model = family_model("llama")
    for metadata, said in (
        ({"general.type": "adapter"}, "LoRA adapter"),
        ({"general.type": "mmproj"}, "text model"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
        ({"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 2.0}, "'su'"),
        ({"tokenizer.ggml.model": "bert"}, "no tokenizer can be made"),
        ({"llama.vocab_size": 400}, f"{path}: model.embed_tokens.weight has shape [320, 64]"),
        ({"llama.embedding_length": 63}, "63"),
        ({"split.count": "2"}, "split.count = '2' of its metadata is not a whole number"),
        ({"general.type": [1, 2]}, "general.type = [1, 2] of its metadata is not a text"),
        ({"tokenizer.ggml.eot_token_id": [1, 2]}, "eot_token_id = [1, 2] of its metadata is not a whole number"),
        (
            {"llama.attention.head_count_kv": [1] * 6},
            "head_count_kv = [1, 1, 1, 1, 1, 1] of its metadata is not a number",
        ),
        ({"llama.rope.freq_base": "x"}, "rope.freq_base = 'x' of its metadata is not a number"),
        ({"llama.rope.scaling.type": 2}, "rope.scaling.type = 2 of its metadata is not a text"),
        ({"llama.attention.head_count": 0}, "head_count = 0: more than 0"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": -2.0}, "factor = -2.0: more than 0"),
        ({"llama.rope.dimension_count": 16}, "rope.dimension_count = 16 of a head's 32"),
    ):
        assert said in line(write_gguf(path, model, "llama", metadata=metadata))
    split = write_gguf(tmp_path / "x-00002-of-00003.gguf", model, "llama")
    assert "llama-gguf-split --merge" in line(split)
    edited(file, path, (b"llama.block_count", b"llama.block_xxxxx"))
    assert "llama.block_count" in line(path)


def test_an_architecture_without_support_is_named(file, tmp_path, capsys):
    """Known to transformers' GGUF reader alone, to Loopwise alone, to neither."""
    for name in ("mamba", "gemma", "bogus", "clip"):
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", name)
        writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        line = refused(capsys, tmp_path, tmp_path / "model.gguf", tmp_path / "out", "sizes=1,2,1")
        assert repr(name) in line
        assert "qwen3" in line


def test_a_vocabulary_alone(tmp_path, capsys):
    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "a vocabulary" in refused(capsys, tmp_path, tmp_path / "vocab.gguf", tmp_path / "out", "sizes=1,2,1")


def test_a_type_that_cannot_be_dequantised_is_named(file, tmp_path, capsys):
    writer_types = {"Q8_1": 9, "Q8_K": 15, "number 99": 99}
    name = b"blk.0.attn_k.weight"
    at = file.read_bytes().index(name) + len(name) + 4 + 16
    for said, number in writer_types.items():
        content = bytearray(file.read_bytes())
        content[at : at + 4] = number.to_bytes(4, "little")
        (tmp_path / "model.gguf").write_bytes(content)
        line = refused(capsys, tmp_path, tmp_path / "model.gguf", tmp_path / "out", "sizes=1,2,1")
        assert f"type {said}," in line
        assert "blk.0.attn_k.weight" in line


def test_tensors_that_the_model_has_no_place_for_or_lacks(file, tmp_path, capsys):
    path = edited(file, tmp_path / "model.gguf", (b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    line = refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")
    assert f"{path}: tensor blk.1.ffn_xx.weight" in line
    path = edited(file, tmp_path / "model.gguf", (b"rms_epsilon", b"xxx_epsilon"))
    assert "layer_norm_rms_epsilon" in refused(capsys, tmp_path, path, tmp_path / "out", "sizes=1,2,1")


def test_random_damage_never_shows_a_traceback(file, tmp_path, capsys):
    """Every byte of the header in turn is a length, a type or a text of something."""
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(25):
        damaged = bytearray(content)
        damaged[int(rng.integers(0, 20_000))] ^= int(rng.integers(1, 256))
        (tmp_path / "model.gguf").write_bytes(damaged)
        code = main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out"), "sizes=1,2,1", "--dry-run"])
        printed = capsys.readouterr().err
        assert code in (0, 2)
        assert printed.count("\n") == (1 if code else 0), printed


def test_eval_takes_it_and_train_says_what_to_do(file, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 100)
    keys = ["data=" + str(text), "sequence_length=32", "--json"]
    assert main(["convert", str(file), str(tmp_path / "out"), *EVERY_LAYER]) == 0
    losses = []
    for model in (file, file.parent, tmp_path / "out"):
        capsys.readouterr()
        assert main(["eval", str(model), *keys]) == 0
        losses.append(capsys.readouterr().out.partition('"loss": ')[2].partition(",")[0])
    assert losses[0] == losses[1] == losses[2] != ""
    assert main(["train", str(file), str(tmp_path / "run"), f"data.train={text}", "steps=1"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "loopwise convert" in printed


@pytest.mark.parametrize("verb", [["inspect"], ["export", "--unroll=2"], ["calibrate"]])
def test_other_verbs_say_what_to_do(verb, file, tmp_path, capsys):
    """The answer is one for the file and for a folder with it, and another for a file that is none."""
    folder, text = tmp_path / "folder", tmp_path / "text.txt"
    folder.mkdir()
    shutil.copy(file, folder / "model.gguf")
    text.write_text("x")
    more = {"inspect": [], "export": [tmp_path / "out"], "calibrate": [text]}[verb[0]]
    for given, said in (
        (file, "a GGUF file; "),
        (folder, f"{folder / 'model.gguf'}: a GGUF file; "),
        (text, "a file; "),
    ):
        assert main([verb[0], *map(str, (given, *more)), *verb[1:]]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_file_of_a_hub_repository(file, tmp_path, monkeypatch, capsys):
    """ID:FILE.gguf, through the hub client's cache; ID alone names what the repository holds."""
    import huggingface_hub
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "a" * 40
    repository = tmp_path / "hub" / "models--me--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "tiny.Q8_0.gguf").write_bytes(file.read_bytes())
    assert main(["convert", "me/tiny:tiny.Q8_0.gguf", str(tmp_path / "out"), "sizes=1,2,1"]) == 0
    facts = (tmp_path / "out" / "loopwise.json").read_text()
    assert commit in facts
    assert "base_model: me/tiny\n" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: ["README.md", "tiny.Q8_0.gguf", "tiny.Q4_0.gguf"]
    )
    capsys.readouterr()
    line = refused(capsys, tmp_path, "me/tiny", tmp_path / "two", "sizes=1,2,1")
    assert "me/tiny:tiny.Q8_0.gguf, me/tiny:tiny.Q4_0.gguf" in line


CARDS = {  # files beside the GGUF file -> licence and base model of the output, for the file, its directory, the hub
    "card": ({"README.md": "---\nlicense: mit\nbase_model: them/base\n---\n# It\n", "LICENSE": "Do."}, *3 * ["mit"]),
    "licence": ({"LICENSE": "Apache License Version 2.0"}, "llama3.2", "llama3.2", "llama3.2"),
    "nothing": ({}, *3 * ["llama3.2"]),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_card_is_of_the_directory_else_of_the_metadata(name, monkeypatch, tmp_path):
    """A licence that lies beside a file by chance, without a model card, is not copied."""
    files, *licences = CARDS[name]
    folder = tmp_path / "source"
    folder.mkdir()
    metadata = {"general.license": "llama3.2", "general.base_model.count": 1}
    metadata["general.base_model.0.repo_url"] = f"{constants.HUGGINGFACE_CO_URL_HOME}meta/base"
    file = write_gguf(folder / "model.gguf", family_model("llama"), metadata=metadata)
    for beside, text in files.items():
        (folder / beside).write_text(text)
    with serving() as hub:
        ask(hub, tmp_path / "home", monkeypatch)
        hub.add("them/gguf", folder)
        for source, licence in zip((file, folder, "them/gguf:model.gguf"), licences, strict=True):
            out = tmp_path / f"out-{Path(str(source)).name}"
            assert main(["convert", str(source), str(out), *EVERY_LAYER, "--no-verify"]) == 0
            card = read_metadata(out / "README.md")
            base = "them/gguf" if str(source).startswith("them") else "them/base" if name == "card" else "meta/base"
            assert (card["license"], card["base_model"]) == (licence, base)
            copied = name == "card" or (name == "licence" and source != file)
            assert (out / "LICENSE").exists() == copied
