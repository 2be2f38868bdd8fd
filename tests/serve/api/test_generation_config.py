"""generation_config.json and settings of depth and memory in the engine without vLLM; the server's are in test_http."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loopwise.model  # noqa: F401
from loopwise.cli import main
from loopwise.errors import UserError
from loopwise.serve import Engine, Params, memory
from loopwise.serve.api.generation_config import APPLIED, fields_of, sampling_of, stop_ids, unapplied
from loopwise.serve.params import NEUTRAL
from tests.helpers import tiny
from tests.helpers.serve_tiny import GROUPED, save, source_config

PROMPT = [3, 5, 7, 11]
LEARNED = ["gpt2", "gpt_bigcode", "opt"]  # the engine takes no others: gpt_neo's and biogpt's attention is fixed


def write(folder: Path, **fields) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return Path(shutil.copytree(model[0], tmp_path / "m"))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def words(folder: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def free(folder: Path, count: int = 12) -> list[int]:
    """transformers' continuation of PROMPT, where nothing stops it."""
    model = load(folder)
    out = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(PROMPT) :].tolist()


def test_the_stop_tokens_of_generation_config_alone_stop_an_imported_model(tmp_path):
    """Case 19: config.json of the source names no token that ends a text, generation_config.json two."""
    golden = Path(shutil.copytree("tests/convert/golden/huginn", tmp_path / "source"))
    (golden / "expected.safetensors").unlink()
    folder = tmp_path / "model"
    assert main(["convert", str(golden), str(folder)]) == 0
    tokens = free(folder)
    write(folder, eos_token_id=[63, tokens[5]], pad_token_id=0)
    model = load(folder)
    want = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)[0, len(PROMPT) :].tolist()
    assert want == tokens[: tokens.index(tokens[5]) + 1]
    for made in (Engine(folder, dtype="float32"), Engine(model)):
        (got,) = made.generate([PROMPT], Params(max_tokens=12))
        assert (got.tokens, got.finish_reason) == (want, "stop")
        (whole,) = made.generate([PROMPT], Params(max_tokens=12, ignore_eos=True))
        assert whole.tokens == tokens


def test_generate_stops_as_transformers_does_and_says_how_it_sampled(capsys, folder):
    model = load(folder)
    ids = words(folder, "abc")
    whole = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 3:].tolist()
    write(folder, eos_token_id=[257, whole[4]], max_new_tokens=12)
    want = whole[: whole.index(whole[4]) + 1]
    keys = ["details=true", "dtype=float32"]
    assert main(["generate", str(folder), "prompt=abc", *keys]) == 0
    said = capsys.readouterr()
    done = json.loads(said.out)
    assert (done["tokens"], done["finish_reason"]) == (want, "stop")
    assert done["sampling"] == {**NEUTRAL, "seed": 0, "max_tokens": 12}
    assert "loopwise: generation_config.json: max_tokens=12 (keys of the command win" in said.err
    assert main(["generate", str(folder), "prompt=abc", *keys, "max_tokens=2"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["tokens"] == whole[:2]
    assert "generation_config.json" not in said.err


def test_every_default_of_sampling_is_taken_and_keys_win(folder):
    said = {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.2}
    said |= {"presence_penalty": 0.1, "frequency_penalty": -0.1, "max_tokens": 7}
    write(folder, do_sample=True, max_new_tokens=7, **{n: v for n, v in said.items() if n != "max_tokens"})
    engine = Engine(folder)
    assert engine.defaults == said
    explicit = Params(ignore_eos=True, seed=3, **said)
    (want,), (got,) = (engine.generate([PROMPT], params) for params in (explicit, Params(ignore_eos=True, seed=3)))
    assert got.tokens == want.tokens
    assert len(got.tokens) == 7
    none: dict[str, Any] = dict.fromkeys(("presence_penalty", "frequency_penalty"), 0) | {"repetition_penalty": 1}
    (greedy,) = engine.generate([PROMPT], Params(7, ignore_eos=True, temperature=0, **none))
    write(folder)
    assert Engine(folder).generate([PROMPT], Params(7, ignore_eos=True))[0].tokens == greedy.tokens != got.tokens


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"temperature": 0.9}, {"temperature": 0.9}),
        ({"top_k": -1, "max_new_tokens": 5}, {"top_k": 0, "max_tokens": 5}),
    ],
)
def test_what_the_fields_mean(fields, said):
    assert sampling_of(fields) == said


def test_what_an_engine_does_not_do_is_named_once(folder):
    write(folder, length_penalty=1.2, num_beams=4, bad_words_ids=[[5]], typical_p=1.0, pad_token_id=-1, top_k=None)
    told: list[str] = []
    engine = Engine(folder, tell=told.append)
    for _ in range(2):
        engine.generate([PROMPT], Params(2))
    (line,) = told
    assert line == (
        "warning: generation_config.json has length_penalty=1.2, num_beams=4, bad_words_ids=[[5]], which this "
        "engine ignores"
    )
    with pytest.warns(UserWarning, match="num_beams=4"):
        Engine(folder)
    assert unapplied(fields_of(folder), APPLIED) == ["length_penalty=1.2", "num_beams=4", "bad_words_ids=[[5]]"]
    assert unapplied({"max_length": 20}, APPLIED) == []  # transformers' default
    assert unapplied({"max_length": 4096}, APPLIED) == ["max_length=4096"]


def test_every_field_of_transformers_is_applied_named_or_says_nothing():
    """A field that a release of transformers brings has a place in `generation_config`, or fails here by name."""
    from transformers import GenerationConfig

    from loopwise.serve.api.generation_config import NEUTRAL, SILENT

    named = {"bad_words_ids", "begin_suppress_tokens", "constraints", "dola_layers", "exponential_decay_length_penalty",
             "force_words_ids", "forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "stop_strings",
             "suppress_tokens", "top_h", "watermarking_config"}  # fmt: skip
    fields = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    assert fields - APPLIED - SILENT - set(NEUTRAL) - named == set()
    defaults = GenerationConfig._get_default_generation_params()
    assert unapplied({n: v for n, v in defaults.items() if v is not None}, APPLIED) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ('{"temperature": "warm"}', "temperature='warm': a number"),
        ('{"eos_token_id": ["</s>"]}', "eos_token_id='</s>': a token id, or a list of them"),
        ('{"max_new_tokens": 2.5}', "max_new_tokens=2.5: an integer"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "serve"])
def test_a_damaged_file_is_one_line(capsys, monkeypatch, folder, verb, text, said):
    monkeypatch.delattr("loopwise.serve.server.parse_arguments")
    (folder / "generation_config.json").write_text(text)
    assert main([verb, str(folder), *(["prompt=a"] if verb == "generate" else [])]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"loopwise: error: {folder / 'generation_config.json'}: ")
    assert said in line


def test_a_key_of_sampling_is_refused_where_nothing_is_drawn_and_taken_where_the_file_draws(capsys, folder):
    keys = ["prompt=abc", "max_tokens=2", "top_p=0.5"]
    assert main(["generate", str(folder), *keys]) == 2
    assert "temperature=0 draws nothing; set a temperature" in capsys.readouterr().err
    write(folder, do_sample=True)
    assert main(["generate", str(folder), *keys]) == 0


def test_stop_ids():
    assert stop_ids({"eos_token_id": [5, -1]}) == {5}
    assert stop_ids({"eos_token_id": 0}) == {0}
    assert stop_ids({}) == set()


# ---- depth ----------------------------------------------------------------------------------------------------------
def test_generate_runs_deeper_than_the_config_where_there_is_room(capsys, folder):
    model = load(folder)
    keys = ["prompt=abc", "max_tokens=6", "dtype=float32", "details=true", "num_recurrences=13"]
    assert main(["generate", str(folder), *keys]) == 2
    assert "num_recurrences=13: this engine runs 1 to 8; max_recurrences=13 makes room for more" in (
        capsys.readouterr().err
    )
    assert main(["generate", str(folder), *keys, "max_recurrences=16"]) == 0
    done = json.loads(capsys.readouterr().out)
    ids = torch.tensor([words(folder, "abc")])
    model.config.max_recurrences = 16
    want = model.generate(ids, max_new_tokens=6, do_sample=False, num_recurrences=13, eos_token_id=257, pad_token_id=0)
    assert done["tokens"] == want[0, ids.shape[1] :].tolist()
    assert set(done["depths"]) == {13}


def test_a_router_has_the_depths_that_it_has(folder, tmp_path):
    source = source_config("llama", **GROUPED)
    routed = save(tmp_path / "r", source, prelude=[0], core=[1], coda=[2], num_recurrences=3, router={"kind": "token"})
    with pytest.raises(UserError, match="max_recurrences=5: this model's router has 3 recurrences"):
        Engine(routed, max_recurrences=5)


def test_depths_beyond_training_are_warned_of_once(folder):
    config = json.loads((folder / "config.json").read_text())
    config["trained_recurrences"] = {"mean": 3, "min": 1, "max": 4}
    (folder / "config.json").write_text(json.dumps(config))
    told: list[str] = []
    engine = Engine(folder, tell=told.append)
    for depth in (4, 5, 5):
        engine.generate([PROMPT], Params(2, depth))
    assert told == ["warning: num_recurrences=5: this model was trained at 1 to 4 recurrences (mean 3), and not beyond"]


# ---- limits ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", LEARNED)
@pytest.mark.parametrize("decoder", ["plain", "wave"])
def test_a_model_of_learned_positions_fills_all_of_them(tmp_path, source, decoder):
    fields: dict[str, Any] = {"max_position_embeddings": 24} if source == "opt" else {"n_positions": 24}
    tiny.save_source(tmp_path / "s", source, **fields)
    assert main(["convert", str(tmp_path / "s"), str(tmp_path / "m"), "sizes=1,2,1", "--no-verify"]) == 0
    in_flight = 4 if decoder == "wave" else 1
    engine = Engine(tmp_path / "m", dtype="float32", max_in_flight=in_flight)
    assert engine.max_model_len == 24
    params = Params(99, 2, ignore_eos=True, temperature=0, decoder=decoder, max_in_flight=in_flight)
    (done,) = engine.generate([[5, 6, 7]], params)
    assert (len(done.tokens), done.finish_reason) == (22, "length")
    model = load(tmp_path / "m")
    ids = torch.tensor([[5, 6, 7]])
    want = model.generate(ids, max_new_tokens=22, do_sample=False, eos_token_id=None, pad_token_id=0, num_recurrences=2)
    assert done.tokens == want[0, 3:].tolist()


def test_what_does_not_fit_in_memory_is_one_line_with_advice_that_works(monkeypatch, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention: Any = Engine(folder, dtype="float32", max_num_seqs=1, max_model_len=16).loop.forward.attention
    bytes_of = sum(part.nbytes for pair in attention.caches for part in pair) // 32  # two blocks
    monkeypatch.setattr(memory, "available", lambda device=None: 4 * 100 * bytes_of)
    with pytest.raises(
        UserError, match=r"max_num_seqs=4 of max_model_len=400 at max_recurrences=8 \(kv_policy=per-depth\)"
    ) as told:
        Engine(folder, dtype="float32", max_num_seqs=4, max_model_len=400)
    advice = str(told.value).split("choose ")[1]
    assert advice == "max_model_len=89, or a smaller max_recurrences"
    Engine(folder, dtype="float32", max_num_seqs=4, max_model_len=89)
    with pytest.raises(UserError, match="choose max_model_len=89, or max_num_seqs=3, or a smaller"):
        Engine(folder, dtype="float32", max_num_seqs=4, max_model_len=111)
    Engine(folder, dtype="float32", max_num_seqs=3, max_model_len=111)


@pytest.mark.parametrize("verb", ["generate", "serve"])
def test_what_is_no_recurrent_depth_model_is_one_line(capsys, tmp_path, verb):
    more = ["prompt=a"] if verb == "generate" else []
    tiny.save_source(tmp_path / "plain")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "model.gguf").write_bytes(b"GGUF")
    for place, said in {
        "plain": "model_type is 'llama', not 'recurrent_depth'; turn it into one with `loopwise convert`",
        "model.gguf": "a GGUF file; turn it into a recurrent-depth model with `loopwise convert`",
        "files": "a GGUF file; turn it into a recurrent-depth model with `loopwise convert`",
        "missing": "no such directory; MODEL is a directory written by `loopwise convert` or `loopwise train`",
    }.items():
        assert main([verb, str(tmp_path / place), *more]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"loopwise: error: {tmp_path / place}")
        assert line.endswith(said)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"temperature": -1}, "temperature=-1: a number of 0 or more"),
        ({"temperature": "hot"}, "temperature='hot': a number of 0 or more"),
        ({"top_p": 0}, "top_p=0: a number above 0, up to 1"),
        ({"min_p": 2}, "min_p=2: a number from 0 to 1"),
        ({"top_k": 2.5}, "top_k=2.5: an integer of 0 or more; -1: all"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: an integer above 0"),
        ({"do_sample": "false"}, "do_sample='false': true or false"),
    ],
)
def test_values_out_of_range_name_the_file(fields, rule, tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(UserError) as told:
        fields_of(tmp_path)
    assert str(told.value) == f"{file}: {rule}"
