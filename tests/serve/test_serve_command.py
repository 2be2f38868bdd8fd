"""`loopwise serve`: what it refuses before it starts, and one real server from start to SIGTERM."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch
from serve_tiny import GROUPED, RETROFIT, generate, prompts, save, source_config

from loopwise.cli import main
from loopwise.errors import UserError
from loopwise.serve.checkpoint import Facts
from loopwise.serve.defaults import choose
from loopwise.serve.recipe import ServeRecipe
from loopwise.serve.vllm.limits import refuse

pytestmark = pytest.mark.xdist_group("vllm")  # one engine at a time
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model's directory, and the model."""
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    return folder, save(folder, source_config("llama", **GROUPED), **RETROFIT)


def copy_of(model, to: Path) -> Path:
    shutil.copytree(model[0], to)
    return to


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def free_port() -> int:
    """A port below those that the kernel hands out, so that nobody else gets it while a server starts."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            return port


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
        ({"router": {"kind": "expert", "inference": "topk"}}, [], "router.inference='topk' takes the best"),
        ({"router": {"kind": "token"}}, ["kv_policy=single"], "a routed model's is its router.kv, 'recursion-wise'"),
        ({"router": {"kind": "token"}}, ["decoder=wave"], "a routed model's tokens have the depths of its router"),
        ({"router": {"kind": "token"}, "num_recurrences": 3, "max_recurrences": 3}, ["num_recurrences=2"], "has 3"),
        ({}, ["decoder=wave", "kv_policy=single"], "decoder='wave': a wave needs keys and values of every depth"),
        ({}, ["decoder=waves"], "decoder"),
        ({}, ["engine=fixed", "decoder=wave"], "decoder=wave: the fixed engine has one position of a"),
        ({"sharing": "sequence"}, ["engine=lanes"], "use engine=fixed"),
        *(
            ({}, ["engine=fixed", f"{name}=3"], f"{name}=3: the fixed engine has one position of a request in flight")
            for name in ("ticks", "wave", "width", "budget", "coda_wait")
        ),
        ({"num_recurrences": 4}, ["min_recurrences=6"], "min_recurrences=6: at most num_recurrences, which is 4"),
        ({}, ["engine=fixed", "exit_rule=cosine"], "exit_rule=cosine: the fixed engine has no exits"),
        ({}, ["exit_rule=latent_diff"], "did you mean 'latent-diff'?"),
        ({}, ["exit_rule=gate"], "exit_rule='gate': choose from fixed, latent-diff"),
        ({}, ["exit_rule=cosine", "exit_threshold=-1"], "exit_threshold=-1.0: at least 0"),
        ({}, ["kv_policy=double"], "kv_policy='double': choose from per-depth, last-exited"),
        ({}, ["num_recurrences=3", "max_recurrences=2"], "num_recurrences=3"),
        ({}, ["kv_policy=per-depth", "max_recurrences=6", "width=5"], "width=6 or more, or 0 for no bound"),
    ],
)
def test_refuses_what_the_model_or_the_engine_cannot_do(capsys, model, tmp_path, fields, settings, said):
    folder = copy_of(model, tmp_path / "m")
    change_config(folder, **fields)
    assert said in refusal(capsys, folder, *settings)


def test_says_what_it_picked():
    def line(facts: Facts, **settings: object) -> str:
        return choose(facts, ServeRecipe.model_validate(settings)).line()

    facts = Facts("llama", 3, 8, "last-exited", {"rule": "cosine", "threshold": 0.1}, False, "cycle")
    assert "engine=lanes: num_recurrences=3 (a request may ask for 1 to 8), exit_rule=cosine" in line(facts)
    assert (
        "exit_threshold=0.1, min_recurrences=1, kv_policy=last-exited, decoder=plain (up to wave=8 tokens of "
        in line(facts)
    )
    assert "decoder=wave (up to wave=5 tokens of a request in flight), 16 ticks a step" in line(
        facts, decoder="wave", wave=5
    )
    assert "16 ticks a step, passes of 12 lanes" in line(facts, width=12)
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
        ({"exit": "cosine"}, "config.json", "exit='cosine': an object or null"),
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
            "layernorm.weight' has shape [64]; config.json says [128]",
        ),
        ({"source_config.vocab_size": 260}, "model.safetensors", "has shape [259, 64]; config.json says [260, 64]"),
        (
            {"source_config.num_key_value_heads": 4},
            "model.safetensors",
            "k_proj.weight' has shape [64, 64]; config.json says",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_with_its_file(capsys, monkeypatch, model, tmp_path, verb, fields, file, said):
    """Before vLLM is even asked, and alike by both commands that run an engine."""
    monkeypatch.delattr("loopwise.serve.server._vllm_arguments")
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


class Server:
    """A `loopwise serve` process in a session of its own."""

    def __init__(self, folder: Path, *settings: str):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder.parent / f"{port}.log"
        command = [sys.executable, "-m", "loopwise", "serve", folder, f"port={port}", "--recipe", "exact", *settings]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait_until(self, condition, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < end, self.log.read_text()[-4000:]
            time.sleep(0.1)

    def healthy(self) -> bool:
        try:
            return urllib.request.urlopen(self.url + "/health", timeout=5).status == 200
        except OSError:
            return False

    def processes(self) -> list[str]:
        """Command lines of all processes of the session that have not ended."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append((entry / "cmdline").read_text().replace("\0", " ").strip())
            except (OSError, ValueError):  # not a process, or no longer one
                continue
        return found

    def wait_for_end(self) -> int:
        """The exit code, once no process of the session is left."""
        code = self.process.wait(60)
        end = time.monotonic() + 5
        while self.processes() and time.monotonic() < end:
            time.sleep(0.1)
        assert not self.processes()
        return code

    def kill(self) -> None:
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.getsid(int(entry.name)) == self.process.pid:
                    os.kill(int(entry.name), signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


@pytest.fixture(scope="module")
def server(model):
    """A server at R=3 in fp32. The last test of this file ends it."""
    started = Server(model[0], "num_recurrences=3")
    try:
        started.wait_until(started.healthy, 240)
        yield started
    finally:
        started.kill()


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)


GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 8}


@needs_vllm
def test_completion_equals_transformers(client, model):
    prompt = prompts()[4]
    reply = client.completions.create(
        **GREEDY, prompt=prompt, logprobs=1, extra_body={"ignore_eos": True, "return_token_ids": True}
    )
    want = generate(model[1], prompt, 3, 8)
    assert reply.choices[0].token_ids == want.tokens
    assert reply.choices[0].logprobs.token_logprobs == pytest.approx(want.logprobs, abs=1e-3)
    assert reply.usage.completion_tokens == 8


@needs_vllm
def test_streaming_says_the_same(client):
    request = {**GREEDY, "prompt": "def f(x):", "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**request).choices[0].text
    parts = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    assert len(parts) > 1
    assert "".join(parts) == whole


@needs_vllm
def test_chat_with_logprobs_and_streaming(client):
    request = {**GREEDY, "messages": [{"role": "user", "content": "hello"}], "extra_body": {"ignore_eos": True}}
    reply = client.chat.completions.create(**request, logprobs=True, top_logprobs=2)
    assert reply.choices[0].message.role == "assistant"
    assert len(reply.choices[0].logprobs.content) == 8
    assert all(len(token.top_logprobs) == 2 for token in reply.choices[0].logprobs.content)
    parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**request, stream=True)]
    assert "".join(parts) == reply.choices[0].message.content


@needs_vllm
def test_models_and_metrics(client, server):
    assert [m.id for m in client.models.list()] == ["tiny"]
    client.completions.create(**GREEDY, prompt=[1, 2], extra_body={"ignore_eos": True, "num_recurrences": 5})
    lines = urllib.request.urlopen(server.url + "/metrics", timeout=30).read().decode().splitlines()
    metrics = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(metrics['vllm:generation_tokens_total{engine="0",model_name="tiny"}']) >= 8
    assert float(metrics['loopwise:core_passes_total{model_name="tiny"}']) >= 5 * 8
    exits = [float(metrics[f'loopwise:exit_depth_bucket{{le="{n}.0",model_name="tiny"}}']) for n in (4, 5)]
    assert exits[1] - exits[0] >= 8
    assert float(metrics['loopwise:exit_depth_count{model_name="tiny"}']) >= 8
    for name in ("lanes_per_tick", "coda_batch_size"):
        assert float(metrics[f'loopwise:{name}_sum{{model_name="tiny"}}']) > 0


@needs_vllm
@pytest.mark.parametrize("place", ["body", "vllm_xargs"])
@pytest.mark.parametrize("depth", [1, 5])
def test_a_request_chooses_its_depth(client, model, depth, place):
    fields = {"num_recurrences": depth}
    more = {"ignore_eos": True, "return_token_ids": True, "return_recurrences": True}
    more |= fields if place == "body" else {"vllm_xargs": fields}
    reply = client.completions.create(**GREEDY, prompt=prompts()[3], n=1, extra_body=more)
    assert reply.choices[0].token_ids == generate(model[1], prompts()[3], depth, 8).tokens
    assert reply.usage.recurrences == {"mean": depth, "total": 8 * depth, "per_token": [[depth] * 8]}


@needs_vllm
@pytest.mark.parametrize("place", ["body", "vllm_xargs"])
def test_a_request_chooses_its_decoder(client, model, server, place):
    """A wave gives the plain tokens in fewer passes, and so do parameters that read earlier tokens; usage tells."""
    prompt, usage = prompts()[3], {}
    want = generate(model[1], prompt, 3, 24).tokens
    for decoder in ("plain", "wave", "diffusion"):
        fields: dict = {"decoder": decoder} | ({"wave": 4} if decoder != "plain" else {})
        fields |= {"diffusion": {"inner": 1, "threshold": 1e-5}} if decoder == "diffusion" else {}
        more = {"ignore_eos": True, "return_token_ids": True, **(fields if place == "body" else {"vllm_xargs": fields})}
        reply = client.completions.create(**{**GREEDY, "max_tokens": 24}, prompt=prompt, extra_body=more)
        usage[decoder] = reply.usage.passes
        if decoder != "diffusion":
            assert reply.choices[0].token_ids == want
    plain = {"sequential": 69, "per_token": 3.0, "wave": 1.0, "items": 69, "wasted": 0}
    assert usage["plain"] == plain
    assert usage["wave"]["sequential"] < 69 <= usage["wave"]["items"] == 69 + usage["wave"]["wasted"]
    assert usage["diffusion"]["wave"] > 1
    more = {"ignore_eos": True, "return_token_ids": True, "decoder": "wave"}
    reply = client.completions.create(**{**GREEDY, "max_tokens": 24}, prompt=prompt, logprobs=1, extra_body=more)
    assert reply.choices[0].token_ids == want
    assert len(reply.choices[0].logprobs.tokens) == 24
    assert reply.usage.passes == plain
    lines = urllib.request.urlopen(server.url + "/metrics", timeout=30).read().decode().splitlines()
    metrics = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    name = 'loopwise:{}_total{{decoder="{}",model_name="tiny"}}'
    assert float(metrics[name.format("sequential_passes", "wave")]) >= usage["wave"]["sequential"]
    assert float(metrics[name.format("decoded_tokens", "diffusion")]) >= 24
    assert "loopwise: waves fill a pass up to budget=" in server.log.read_text()


@needs_vllm
def test_a_sampled_wave_is_the_plain_sample_in_every_choice(client):
    request = {**GREEDY, "max_tokens": 24, "temperature": 1, "top_p": 0.9, "seed": 5, "n": 3, "prompt": prompts()[2]}
    texts = []
    for decoder in ("plain", "wave"):
        reply = client.completions.create(**request, extra_body={"ignore_eos": True, "decoder": decoder})
        parts = client.completions.create(
            **{**request, "n": 1}, stream=True, extra_body={"ignore_eos": True, "decoder": decoder}
        )
        texts.append(([choice.text for choice in reply.choices], "".join(part.choices[0].text for part in parts)))
    assert texts[0] == texts[1]
    assert len(set(texts[0][0])) == 3


@needs_vllm
def test_usage_counts_the_recurrences_of_every_choice(client):
    prompt = prompts()[2]
    trace = [3] * len(prompt) + [1, 2, 3, 1, 1, 2, 3]
    depths = [3, *trace[len(prompt) :]]
    trace += [1] * 1000  # for positions that do not come, some of which the model does not even have
    more = {"ignore_eos": True, "trace": trace, "return_recurrences": True}
    request = {**GREEDY, "temperature": 1, "n": 2}
    usage = client.completions.create(**request, prompt=[prompt, prompt], extra_body=more).usage
    assert usage.recurrences == {"mean": 2.0, "total": 4 * 16, "per_token": [depths] * 4}
    assert usage.completion_tokens == 32
    request = {**GREEDY, "messages": [{"role": "user", "content": "hello"}], "extra_body": {"num_recurrences": 2}}
    assert client.chat.completions.create(**request).usage.recurrences["mean"] == 2


@needs_vllm
def test_streamed_usage_counts_recurrences(client):
    request = {**GREEDY, "stream": True, "stream_options": {"include_usage": True}}
    request["extra_body"] = {"ignore_eos": True, "exit_rule": "latent-diff", "exit_threshold": 10.0}
    chunks = list(client.completions.create(**request, prompt="abc"))
    assert chunks[-1].usage.recurrences["total"] == 3 + 7  # the prompt's last position runs at full depth
    assert chunks[-1].usage.completion_tokens == 8
    request["messages"] = [{"role": "user", "content": "hello"}]
    assert list(client.chat.completions.create(**request))[-1].usage.recurrences["total"] == 3 + 7


@needs_vllm
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_recurrences", 9, "an integer from 1 to 8"),
        ("num_recurrences", True, "an integer from 1 to 8"),
        ("num_recurrences", "3", "an integer from 1 to 8"),
        ("min_recurrences", 4, "at most num_recurrences, which is 3"),
        ("exit_rule", "latentdiff", "did you mean 'latent-diff'?"),
        ("exit_rule", "gate", "choose from fixed, latent-diff"),
        ("exit_threshold", float("nan"), "a finite number"),
        ("prompt_exit", True, "kv_policy is 'per-depth'"),
        ("trace", [0], "integers from 1 to num_recurrences, which is 3"),
        ("num_recurences", 3, "did you mean 'num_recurrences'?"),
        ("decoder", "waves", "did you mean 'wave'?"),
        ("wave", 4, "decoder='plain' has one position in flight"),
        ("diffusion", {"inner": 2}, "belongs to decoder='diffusion'"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("place", ["body", "vllm_xargs"])
def test_bad_depth_fields_are_400_and_named(server, path, place, field, value, said):
    fields = {field: value}
    body = {**GREEDY, "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    body |= fields if place == "body" else {"vllm_xargs": fields}
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    error = json.load(caught.value)["error"]
    assert (caught.value.code, error["code"], error["param"], error["type"]) == (400, 400, field, "BadRequestError")
    assert said in error["message"]


@needs_vllm
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/invocations", "/v1/chat/completions/batch"])
@pytest.mark.parametrize("place", ["body", "vllm_xargs"])
def test_other_routes_take_the_fields_too(server, path, place):
    def post(**fields):
        body = {"model": "tiny", "input": "a", "messages": [{"role": "user", "content": "a"}]}
        if path.endswith("batch"):
            body["messages"] = [body["messages"]] * 3
        body |= {
            "max_output_tokens": 2,
            "max_tokens": 2,
            "ignore_eos": True,
            **(fields if place == "body" else {"vllm_xargs": fields}),
        }
        headers = {"Content-Type": "application/json"}
        call = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)
        return json.load(urllib.request.urlopen(call, timeout=60))

    usage = post(num_recurrences=2)["usage"]
    tokens = 6 if path.endswith("batch") else 2
    assert usage.get("output_tokens", usage.get("completion_tokens")) == tokens
    assert usage["recurrences"] == {"mean": 2.0, "total": 2 * tokens}
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(exit_rule="nonsense")
    assert caught.value.code == 400
    assert "choose from fixed, latent-diff" in json.load(caught.value)["error"]["message"]


@needs_vllm
@pytest.mark.parametrize("path", ["/generative_scoring", "/inference/v1/generate"])
def test_routes_without_a_place_for_depth_say_so(server, path):
    def post(**fields):
        body = {"model": "tiny", "query": "a", "items": ["b"], "label_token_ids": [5, 6], **fields}
        body |= {"token_ids": [1, 2], "sampling_params": {"max_tokens": 2}}
        headers = {"Content-Type": "application/json"}
        call = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)
        return json.load(urllib.request.urlopen(call, timeout=60))

    if path == "/generative_scoring":  # the other one wants a server that was started for it
        assert post(num_recurrences=None)
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(num_recurrences=2)
    error = json.load(caught.value)["error"]
    assert (caught.value.code, error["param"]) == (400, "num_recurrences")
    assert f"{path} has no depth fields" in error["message"]
    assert "use /v1/completions, " in error["message"]


@needs_vllm
def test_a_client_that_leaves_is_no_error(server):
    body = json.dumps({**GREEDY, "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", urllib.parse.urlsplit(server.url).port)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        time.sleep(0.3)

    def ended() -> bool:
        with urllib.request.urlopen(server.url + "/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
        assert not [line for line in lines if line.startswith("http_requests_total") and 'status="5xx"' in line]
        return any(line.startswith("vllm:num_requests_running{") and line.endswith(" 0.0") for line in lines)

    server.wait_until(ended, 60)
    assert ended()  # whatever the reply became is counted by now


@needs_vllm
def test_prompts_are_scored(client, model):
    """As evaluation by log-likelihood asks: echo the prompt with its log-probabilities."""
    prompt = prompts()[3]
    reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=1, temperature=0, echo=True, logprobs=1)
    with torch.no_grad():
        logits = model[1](torch.tensor([prompt]), num_recurrences=3).logits[0].log_softmax(-1)
    want = logits[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
    assert reply.choices[0].logprobs.token_logprobs[1 : len(prompt)] == pytest.approx(want.tolist(), abs=1e-3)


@needs_vllm
def test_wrong_requests_are_4xx(client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**GREEDY, "model": "other"}, prompt="a")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**{**GREEDY, "max_tokens": 10_000}, prompt="a")


@needs_vllm
@pytest.mark.parametrize("to_group", [False, True], ids=["sigterm", "ctrl-c"])
def test_drains_and_leaves_no_process(request, to_group, server, model):
    """SIGTERM to the server, or Ctrl-C as a terminal sends it, to all its processes: open requests are answered."""
    if to_group:
        server = Server(model[0], "engine=fixed")
        request.addfinalizer(server.kill)
        server.wait_until(server.healthy, 240)
    body = {**GREEDY, "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    call = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    lines, begun = [], threading.Event()

    def read():
        with urllib.request.urlopen(call, timeout=60) as reply:
            for line in reply:
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    assert any("EngineCore" in process for process in server.processes())
    if to_group:
        os.killpg(server.process.pid, signal.SIGINT)
    else:
        server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    with pytest.raises(urllib.error.HTTPError) as refused:  # later ones are not
        urllib.request.urlopen(call, timeout=60)
    error = json.load(refused.value)["error"]
    assert (refused.value.code, error["code"], error["message"]) == (503, 503, "the server is shutting down")
    assert server.wait_for_end() == 0
    reader.join()
    events = [line.removeprefix(b"data: ").strip() for line in lines if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    usage = json.loads(events[-2])["usage"]
    assert usage["completion_tokens"] == 400
    assert usage["recurrences"]["mean"] == (1 if to_group else 3)  # the model's, and that of the first server


@needs_vllm
@pytest.mark.parametrize("seconds", [300, 1])
def test_a_second_signal_or_the_end_of_the_drain_cuts_it_short(request, model, seconds):
    """Replies end with what there is, and so does the server, whatever its clients do; no process is left."""
    server = Server(model[0], "num_recurrences=8", "ticks=1", f"drain_seconds={seconds}", "--", "--enforce-eager")
    request.addfinalizer(server.kill)
    server.wait_until(server.healthy, 240)
    body = {**GREEDY, "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 16}
    slow = {"temperature": 1, "repetition_penalty": 1.1, "logprobs": 5}  # which the host looks at for every token
    text = json.dumps(body | slow).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    address = "127.0.0.1", urllib.parse.urlsplit(server.url).port
    with socket.create_connection(address, 60) as stuck, socket.create_connection(address, 60) as client:
        stuck.sendall(head.encode() + b"\r\n\r\n{")  # and no more
        client.sendall(head.encode() + b"\r\n\r\n" + text)
        heard = b""
        while not all(b'"index":%d,' % n in heard for n in range(16)):
            heard += client.recv(1 << 20)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None
        start = time.monotonic()
        if seconds > 1:
            server.process.send_signal(signal.SIGINT)
        while part := client.recv(1 << 20):
            heard += part
        assert server.wait_for_end() == 0
    assert time.monotonic() - start < 15
    assert heard.count(b'"finish_reason":"abort"') == 16
    assert b"data: [DONE]" in heard
    log = server.log.read_text()
    assert ("a second signal: open requests are cut off" in log) == (seconds > 1)
    assert "Traceback" not in log


@needs_vllm
def test_sigterm_while_the_engine_starts(request, model, capsys):
    server = Server(model[0], "--", "--enforce-eager")
    request.addfinalizer(server.kill)
    server.wait_until(lambda: any("EngineCore" in process for process in server.processes()), 120)
    port = server.url.rpartition(":")[2]
    assert f"port {port} of 127.0.0.1 is in use" in refusal(capsys, model[0], f"port={port}")
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_for_end() == 128 + signal.SIGTERM
