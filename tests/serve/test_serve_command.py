"""`loopwise serve`: what it refuses before it starts."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loopwise.cli import main
from loopwise.errors import UserError
from loopwise.serve.checkpoint import Facts
from loopwise.serve.defaults import choose
from loopwise.serve.recipe import ServeRecipe
from loopwise.serve.vllm.argument_errors import explained
from loopwise.serve.vllm.arguments import refuse
from tests.helpers.serve_tiny import change_config
from tests.helpers.serving import Server, free_port

pytestmark = pytest.mark.xdist_group("vllm")  # one engine at a time
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def copy_of(model, to: Path) -> Path:
    shutil.copytree(model[0], to)
    return to


def refusal(capsys, folder: Path, *settings: str) -> str:
    """The one line that `loopwise serve` answers with, exit code 2."""
    assert main(["serve", str(folder), f"port={free_port()}", *settings]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_refuses_a_missing_directory(capsys, tmp_path):
    assert "no such directory" in refusal(capsys, tmp_path / "nowhere")


def test_refuses_a_directory_without_config(capsys, tmp_path):
    assert "no config.json" in refusal(capsys, tmp_path)


def test_refuses_a_broken_config(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in refusal(capsys, tmp_path)


def test_refuses_another_kind_of_model(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    line = refusal(capsys, tmp_path)
    assert "'llama'" in line
    assert "loopwise convert" in line


def test_refuses_an_architecture_that_vllm_lacks_and_lists_the_others(capsys, model, tmp_path):
    folder = copy_of(model, tmp_path / "m")
    change_config(folder, source_config={"model_type": "bloom"})
    line = refusal(capsys, folder)
    assert "'bloom' cannot be served" in line
    assert "gemma3_text, " in line
    assert "llama, " in line


def test_refuses_a_depth_beyond_the_limit(capsys, model):
    line = refusal(capsys, model[0], "num_recurrences=9")
    assert "num_recurrences=9" in line
    assert "1 to 8" in line
    assert "max_recurrences" in line


def test_refuses_a_depth_of_none(capsys, model):
    assert "num_recurrences=0" in refusal(capsys, model[0], "num_recurrences=0")


def test_refuses_quantised_weights(capsys, model, tmp_path):
    folder = copy_of(model, tmp_path / "m")
    change_config(folder, quantization_config={"quant_method": "fp8"})
    assert "--quantization fp8" in refusal(capsys, folder)


@pytest.mark.parametrize(
    ("fields", "settings", "said"),
    [
        (
            {"router": {"kind": "expert", "inference": "topk"}},
            [],
            "router.inference='topk' ranks the tokens of a whole sequence",
        ),
        ({"router": {"kind": "token"}}, ["kv_policy=single"], "a routed model has router.kv='recursion-wise' instead"),
        ({"router": {"kind": "token"}}, ["decoder=wave"], "a routed model's tokens have the depths of its router"),
        ({"router": {"kind": "token"}, "num_recurrences": 3, "max_recurrences": 3}, ["num_recurrences=2"], "has 3"),
        ({}, ["decoder=wave", "kv_policy=single"], "decoder='wave': a wave needs keys and values of every depth"),
        ({}, ["decoder=waves"], "decoder"),
        ({}, ["draft_every=9"], "draft_every=9: an integer from 1 to 8"),
        ({}, ["draft_every=2", "draft_depths=1,2"], "give draft_every or draft_depths, not both"),
        ({}, ["draft_depths=2,1"], "draft_depths=[2, 1]: a list of depths from 1 to 8"),
        ({}, ["engine=fixed", "decoder=wave"], "decoder=wave: the fixed engine has one position of a"),
        ({"sharing": "sequence"}, ["engine=lanes"], "use engine=fixed"),
        *(
            ({}, ["engine=fixed", f"{name}=3"], f"{name}=3: the fixed engine has one position of a request in flight")
            for name in ("passes_per_step", "max_in_flight", "max_lanes", "budget", "coda_wait", "draft_every")
        ),
        ({"num_recurrences": 4}, ["min_recurrences=6"], "min_recurrences=6: at most num_recurrences, which is 4"),
        ({}, ["engine=fixed", "exit_rule=cosine"], "exit_rule=cosine: the fixed engine has no exits"),
        ({}, ["exit_rule=latent_diff"], "did you mean 'latent-diff'?"),
        ({}, ["exit_rule=gate"], "exit_rule='gate': choose from fixed, latent-diff"),
        ({}, ["exit_rule=cosine", "exit_threshold=-1"], "exit_threshold=-1.0: at least 0"),
        ({}, ["kv_policy=double"], "kv_policy='double': choose from per-depth, last-exited"),
        ({}, ["num_recurrences=3", "max_recurrences=2"], "num_recurrences=3"),
        ({}, ["kv_policy=per-depth", "max_recurrences=6", "max_lanes=5"], "max_lanes=6 or more, or 0 for no bound"),
    ],
)
def test_refuses_what_the_model_or_the_engine_cannot_do(capsys, model, tmp_path, fields, settings, said):
    folder = copy_of(model, tmp_path / "m")
    change_config(folder, **fields)
    assert said in refusal(capsys, folder, *settings)


class OfPydantic(ValueError):
    """As much of a ValidationError as is looked at."""

    def __init__(self, loc: str, msg: str, given: object):
        self.details = {"loc": (loc,), "msg": msg, "input": given}

    def errors(self) -> list[dict]:
        return [self.details]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OfPydantic("max_num_seqs", "Input should be above 0", 0), "--max-num-seqs 0: Input should be above 0"),
        (OfPydantic("max_seqs_of_ticks", "Input should be above 0", 0), "--max-num-seqs 0: Input should be above 0"),
        (OfPydantic("a", "Value error, No dtype. Try b.", 3), "vLLM: No dtype"),
        (ValueError("User-specified max_model_len (9) is\ngreater. To allow"), "--max-model-len 9: User-specified "
         "max_model_len (9) is greater"),
        (KeyError("invalid tool call parser: nope (chose from { a })"), "--tool-call-parser nope: invalid tool call "
         "parser: nope (chose from { a })"),
        (ValueError("Unknown backend: 'NOPE'"), "--tool-call-parser nope: Unknown backend: 'NOPE'"),
        (ValueError("Only enabled. V2"), "vLLM: Only enabled"),
        (ValueError(""), "vLLM: ValueError"),
    ],
)  # fmt: skip
def test_an_error_of_vllm_names_the_flag_at_fault(error, line):
    assert explained(error, {"tool_call_parser": "nope", "max_num_seqs": 0, "max_model_len": 9}) == line


@needs_vllm
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-gpu-blocks-override", "-3"], "--num-gpu-blocks-override -3: an integer above 0"),
        (["--kv-cache-memory-bytes", "-5"], "--kv-cache-memory-bytes -5: an integer above 0"),
        (["--tokenizer", "/nowhere"], "--tokenizer /nowhere: no such file or directory"),
        (["--ssl-keyfile", "/nowhere"], "--ssl-keyfile /nowhere: no such file or directory"),
        (["--structured-outputs-config", '{"backend": 3}'], "argument --structured-outputs-config: backend: Input "
         "should be 'auto', "),
    ],
)  # fmt: skip
def test_a_wrong_value_of_vllm_s_is_one_line(capsys, model, flags, said):
    assert said in refusal(capsys, model[0], "--", *flags)


@needs_vllm
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-num-seqs", "0"], "--max-num-seqs 0: Input should be greater than or equal to 1"),
        pytest.param(
            ["--max-model-len", "9999"], "--max-model-len 9999: User-specified max_model_len (9999) is greater than "
            "the derived max_model_len (max_position_embeddings=512", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_vllm_refuses_itself_is_said_before_the_start(model, flags, said):
    """In a process of its own, as vLLM's socket is open by then."""
    command = [sys.executable, "-m", "loopwise", "serve", str(model[0]), f"port={free_port()}", "--", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("loopwise")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"loopwise: error: {said}")


def test_says_what_it_picked():
    def line(facts: Facts, **settings: object) -> str:
        return choose(facts, ServeRecipe.model_validate(settings)).line()

    facts = Facts("llama", 3, 8, "last-exited", {"rule": "cosine", "threshold": 0.1}, False, "cycle")
    assert "engine=lanes: num_recurrences=3 (a request may ask for 1 to 8), exit_rule=cosine" in line(facts)
    assert (
        "exit_threshold=0.1, min_recurrences=1, kv_policy=last-exited, decoder=plain (up to max_in_flight=8 "
        in line(facts)
    )
    assert "decoder=wave (up to max_in_flight=5 tokens of a request), passes_per_step=16" in line(
        facts, decoder="wave", max_in_flight=5
    )
    assert "(up to max_in_flight=4 tokens of" in line(facts, max_in_flight="auto", draft_every=2)
    assert "(up to max_in_flight=8 tokens of" in line(facts, max_in_flight="auto")
    assert "passes_per_step=16, max_lanes=12" in line(facts, max_lanes=12)
    assert "exit_threshold" not in line(facts, exit_rule="latent-diff")
    assert "whole prompts, no prefix cache" in line(facts, kv_policy="single")
    sequence = Facts("llama", 3, 8, "per-depth", {}, False, "sequence")
    assert line(sequence).startswith("engine=fixed (sharing='sequence'")


def test_names_the_nearest_key(capsys, model):
    assert "did you mean 'num_recurrences'" in refusal(capsys, model[0], "num_recurrence=2")


def test_refuses_a_truncated_file(capsys, model, tmp_path):
    folder = copy_of(model, tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in refusal(capsys, folder)


def test_refuses_a_config_without_weights(capsys, model, tmp_path):
    folder = copy_of(model, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(capsys, folder)


@pytest.mark.parametrize(("drop", "add"), [("core.1.mlp.up_proj.weight", None), (None, "core.7.mlp.up_proj.weight")])
def test_refuses_missing_and_unexpected_tensors(capsys, model, tmp_path, drop, add):
    from safetensors.torch import load_file, save_file

    folder = copy_of(model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    if drop:
        del tensors[drop]
    if add:
        tensors[add] = tensors["core.1.mlp.up_proj.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert (drop or add) in refusal(capsys, folder)


def damage(folder: Path, fields: dict) -> None:
    """Change fields of config.json; `source_config.` leads into the source's."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        place, _, inner = name.rpartition(".")
        (config[place] if place else config)[inner] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("verb", ["serve", "generate"])
@pytest.mark.parametrize(
    ("fields", "file", "said"),
    [
        ({"num_recurrences": "four"}, "config.json", "num_recurrences='four': an integer"),
        ({"num_recurrences": True}, "config.json", "num_recurrences=True: an integer"),
        ({"max_recurrences": None}, "config.json", "max_recurrences=None: an integer"),
        ({"core": "34"}, "config.json", "core='34': a list of integers"),
        ({"prelude": [0, "a"]}, "config.json", "prelude=[0, 'a']: a list of integers"),
        ({"exit": "cosine"}, "config.json", "exit='cosine': a dict, or None"),
        ({"exit": {"rule": "cosine", "min_recurrences": "x"}}, "config.json", "exit.min_recurrences='x': an integer"),
        ({"source_config": "llama"}, "config.json", "source_config='llama': an object"),
        ({"source_config": {}}, "config.json", "source_config.model_type=None: a string"),
        ({"source_config.hidden_size": "64"}, "config.json", "source_config.hidden_size='64': an integer of 1 or more"),
        ({"source_config.num_attention_heads": 0}, "config.json", "source_config.num_attention_heads=0: an integer"),
        ({"source_config.rope_parameters": "x"}, "config.json", "Validation error for field 'rope_parameters'"),
        ({"core": [17]}, "config.json", "core names source layer 17; the source has layers 0 to 5"),
        (
            {"source_config.hidden_size": 128},
            "model.safetensors",
            "layernorm.weight' has shape [64]; config.json implies [128]",
        ),
        ({"source_config.vocab_size": 260}, "model.safetensors", "has shape [259, 64]; config.json implies [260, 64]"),
        (
            {"source_config.num_key_value_heads": 4},
            "model.safetensors",
            "k_proj.weight' has shape [64, 64]; config.json implies",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_with_its_file(capsys, monkeypatch, model, tmp_path, verb, fields, file, said):
    """Before vLLM is even asked, and alike by both commands that run an engine."""
    monkeypatch.delattr("loopwise.serve.server.parse_arguments")
    folder = copy_of(model, tmp_path / "m")
    damage(folder, fields)
    if verb == "serve":
        line = refusal(capsys, folder)
    else:
        assert main(["generate", str(folder), "prompt=a"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"loopwise: error: {folder / file}: ")
    assert said in line


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not valid JSON"),
        ("tokenizer.json", '{"model": 3}', "tokenizer.json: cannot be loaded ("),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: a JSON object is expected"),
        ("tokenizer.json", None, ": its tokenizer: cannot be loaded ("),
    ],
)
def test_a_damaged_tokenizer_is_named(capsys, model, tmp_path, file, text, said):
    """`loopwise serve` reads it by the same function: see the test of vLLM's flags."""
    folder = copy_of(model, tmp_path / "m")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    assert main(["generate", str(folder), "prompt=a"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"loopwise: error: {folder}")
    assert said in line


def test_refuses_a_port_in_use(capsys, model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in refusal(capsys, model[0], f"port={port}")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("pipeline_parallel_size", 2),
        ("enable_lora", True),
        ("speculative_config", {"method": "ngram"}),
        ("quantization", "fp8"),
        ("kv_cache_dtype", "fp8"),
        ("kv_cache_dtype", "bfloat16"),
        ("cpu_offload_gb", 4.0),
        ("runner", "pooling"),
        ("headless", True),
    ],
)
def test_vllm_flags_that_do_not_fit_are_refused_with_a_reason(flag, value):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')}.* does not fit a recurrent-depth model: "):
        refuse({flag: value})


@needs_vllm
def test_vllm_flags_are_checked_by_vllm_and_by_us(model, tmp_path):
    """In a process of their own, which imports vLLM once. So is the tokenizer, which they may replace."""
    broken = copy_of(model, tmp_path / "m") / "tokenizer.json"
    broken.write_text("{")
    without = copy_of(model, tmp_path / "n")
    for file in without.glob("tokenizer*"):
        file.unlink()
    answers = {
        "--no-such-flag": "vLLM: unrecognized arguments: --no-such-flag",
        "--max-model-len many": "vLLM: argument --max-model-len: invalid",
        '--hf-overrides {"num_recurrences":9}': "num_recurrences=9: this model is served at 1 to 8",
        "another/model": "vLLM flags name a model (another/model)",
        "-pp 2": "--pipeline-parallel-size 2 does not fit",
        "--enable-lora": "--enable-lora does not fit",
        '--speculative-config {"method":"ngram","num_speculative_tokens":2}': "--speculative-config",
        "--quantization fp8": "--quantization fp8 does not fit",
        "--kv-cache-dtype fp8": "--kv-cache-dtype fp8 does not fit",
        "--cpu-offload-gb 4": "--cpu-offload-gb 4.0 does not fit",
        "--runner pooling": "--runner pooling does not fit",
        "--api-server-count 2": "--api-server-count 2 does not fit",
        '--kv-transfer-config {"kv_connector":"ExampleConnector","kv_role":"kv_both"}': "no connector moves the keys",
        "--kv-offloading-size 1": "--kv-offloading-size 1.0 does not fit a recurrent-depth model: no connector",
        "--enable-return-routed-experts": "the depths of tokens travel in the field that it fills",
        "--decode-context-parallel-size 2": "are not cut among ranks",
        "--enable-dbo": "--enable-dbo does not fit a recurrent-depth model: a pass of the core is not cut",
        "--watermark 0.1": "--watermark 0.1 does not fit",
        "--enable-prompt-embeds": "--enable-prompt-embeds does not fit",
        "--enable-sleep-mode": "--enable-sleep-mode does not fit",
        "--data-parallel-size 2": "--data-parallel-size 2 does not fit",
        "--distributed-executor-backend external_launcher": "one process on one machine serves it",
        "--load-format dummy": "--load-format dummy does not fit",
        "--optimization-level 3": "the lane engine compiles and records its own passes",
        "-ac.flash_attn_version 2": "--attention-config.flash-attn-version 2 does not fit",
        '--hf-overrides {"kv_policy":"single"}': "--hf-overrides kv_policy: it replaces num_recurrences and",
        '--additional-config {"loopwise_lanes":{"max_lanes":2}}': "--additional-config loopwise_lanes: the keys of",
        "--kv-cache-memory-bytes 2000000": "at max_recurrences=8, and the cache has 1.91 MiB; choose '-- "
        "--max-model-len 256', or max_recurrences=4, or VLLM_CPU_KVCACHE_SPACE=1",
    }
    if not torch.cuda.is_available():
        answers["--block-size 16"] = "--block-size 16: vLLM's attention on CPUs needs a multiple of 32"
    program = "import sys; from loopwise.cli import main; [print(main(a.split(' '))) for a in sys.argv[1:]]"
    calls = [f"serve {model[0]} port={free_port()} -- {flags}" for flags in answers]
    calls += [f"serve {folder} port={free_port()}" for folder in (broken.parent, without)]
    answers["broken tokenizer"] = f"{broken}: not valid JSON"
    answers["none"] = f"{without}: has no tokenizer: name another's directory with '-- --tokenizer'"
    done = subprocess.run([sys.executable, "-c", program, *calls], capture_output=True, text=True, timeout=180)
    assert done.stdout.split() == ["2"] * len(answers)
    lines = [line for line in done.stderr.splitlines() if line.startswith("loopwise: error: ")]
    for line, answer in zip(lines, answers.values(), strict=True):
        assert answer in line
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@needs_vllm
def test_sigterm_while_the_engine_starts(request, model, capsys):
    server = Server(model[0], "--", "--enforce-eager")
    request.addfinalizer(server.kill)
    server.wait_until(lambda: any("EngineCore" in process for process in server.processes()), 120)
    port = server.url.rpartition(":")[2]
    assert f"port {port} of 127.0.0.1 is in use" in refusal(capsys, model[0], f"port={port}")
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_for_end() == 128 + signal.SIGTERM
