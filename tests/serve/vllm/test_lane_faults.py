"""vLLM's lane engine: an exception in the work for one of twelve requests ends that request alone."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.helpers.repository import ROOT
from tests.helpers.run_faults import POISON
from tests.helpers.serve_tiny import GROUPED, RETROFIT, cases_run, run_cases, save, source_config
from tests.helpers.serving import Server, serving

pytestmark = [
    pytest.mark.xdist_group("vllm"),  # one engine at a time
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

GRAMMAR = {"structured_outputs": {"regex": "[ab]{4,40}"}}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 2},
    {"temperature": 0, **GRAMMAR},
    {"temperature": 0, "extra_args": {"exit_rule": "latent-diff", "exit_threshold": 0.5}},
    {"temperature": 0.7, "top_p": 0.9, "seed": 2, "extra_args": {"decoder": "wave", "max_in_flight": 3}},
]
FAULTS: dict[str, dict[str, Any]] = {  # name -> what the poisoned request asks for
    "depth in the scheduler": {"temperature": 0, "extra_args": {"num_recurrences": 3}},
    "depth in the worker": {"temperature": 0, "extra_args": {"num_recurrences": 3}},
    "admission to the sampler": {"temperature": 0},
    "admission to the draws": {"temperature": 0.8125},
    "admission, nothing written": {"temperature": 0, "max_tokens": 11},
    "admission, all written": {"temperature": 0, "max_tokens": 11},
    "second chunk of a prompt": {"temperature": 0},
    "noise": {"temperature": 1.0, "seed": 4242},
    "vLLM's sampler": {"temperature": 0, "presence_penalty": 0.5, "logprobs": 1},
    "log-probabilities of the prompt": {"temperature": 0, "prompt_logprobs": 1},
    "mask of a grammar": {"temperature": 0, **GRAMMAR, "prompt_logprobs": 1},
    "step of a grammar": {"temperature": 0, **GRAMMAR},
}


IN_SHORT = ("admission to the sampler", "vLLM's sampler")


@pytest.fixture(scope="module")
def result(request, tmp_path_factory) -> dict[str, Any]:
    """Twelve requests without a fault and with each that is tested, in one engine. The last two begin as the poisoned
    one does."""
    tested = cases_run(request, FAULTS)
    folder = tmp_path_factory.mktemp("faults")
    source = source_config("llama", **{**GROUPED, "initializer_range": 0.12})
    save(folder / "model", source, num_recurrences=4, max_recurrences=6, kv_policy="last-exited", **RETROFIT)
    draw = random.Random(0)
    lengths = [3, 9, 40, 17, 60, 33, 5, 100, 12, 70, 100, 100]
    prompts = [[draw.randrange(256) for _ in range(length)] for length in lengths]
    prompts[10][:90], prompts[11][:90] = prompts[POISON][:90], prompts[POISON][:90]
    asked = [
        {
            "prompt": prompt,
            "arrive": n // 3 if n < 10 else 12 + n,
            "sampling": {"max_tokens": 9} | KINDS[n % len(KINDS)],
        }
        for n, prompt in enumerate(prompts)
    ]
    case = {"folder": str(folder / "model"), "engine": {}, "requests": asked}
    case |= {"environment": {"VLLM_CPU_OMP_THREADS_BIND": "0"}}
    case |= {"faults": {name: {"max_tokens": 9} | fields for name, fields in tested.items()}}
    (result,) = run_cases([case], folder, "run_faults.py")
    assert "error" not in result, result["error"]
    return result


def test_there_are_twelve(result):
    assert len(FAULTS) == 12
    assert [*FAULTS] == result["faults"]


@pytest.mark.parametrize(
    "name", [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_a_fault_ends_its_request_alone(name, result):
    clean, faulty = result["rounds"][name]
    assert {one["reason"] for one in clean} == {"length"}
    assert faulty[POISON]["reason"] == "error"
    done = faulty[POISON]["tokens"]
    assert done == clean[POISON]["tokens"][: len(done)]
    assert [one for n, one in enumerate(faulty) if n != POISON] == [one for n, one in enumerate(clean) if n != POISON]


def test_nothing_of_them_stays(result):
    assert result["held"] == {"blocks": 0, "requests": 0, "rows": 0, "features": 0}


PLUGIN = """
def register():
    from loopwise.serve.engine.sampling import Draws

    admit = Draws.admit

    def fails(self, row, temperature, *rest):
        if temperature == 0.8125:
            raise ZeroDivisionError("poison")
        return admit(self, row, temperature, *rest)

    Draws.admit = fails
"""


@pytest.mark.slow
def test_over_http_it_is_status_500(tmp_path, monkeypatch):
    """In a stream, an error event. A plugin of vLLM's puts the fault into the engine process."""
    plugin = tmp_path / "plugin"
    (plugin / "poison-1.0.dist-info").mkdir(parents=True)
    (plugin / "poison.py").write_text(PLUGIN)
    (plugin / "poison-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: poison\nVersion: 1.0\n")
    (plugin / "poison-1.0.dist-info/entry_points.txt").write_text("[vllm.general_plugins]\npoison = poison:register\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(plugin), str(ROOT)]))
    save(tmp_path / "tiny", source_config("llama", **{**GROUPED, "initializer_range": 0.12}), **RETROFIT)
    good = [{"temperature": n % 2, "seed": n, "prompt": [n, 5, 6]} for n in range(11)]
    with serving(tmp_path / "tiny", "--", "--enforce-eager") as server:
        clean = [ask(server, body) for body in good]
        assert {status for status, _ in clean} == {200}
        with ThreadPoolExecutor(12) as pool:
            poison = pool.submit(ask, server, {"temperature": 0.8125, "prompt": [1, 5, 6]})
            beside = list(pool.map(lambda body: ask(server, body), good))
        assert beside == clean
        assert poison.result()[0] == 500
        assert '"error"' in poison.result()[1]
        status, stream = ask(server, {"temperature": 0.8125, "prompt": [1, 5, 6], "stream": True})
        assert (status, '"error"' in stream) == (200, True)
        assert server.healthy()
        assert ask(server, good[3]) == clean[3]


def ask(server: Server, body: dict[str, Any]) -> tuple[int, str]:
    """The status of a completion, and its text, or its whole body where there is none."""
    sent = json.dumps({"model": "tiny", "max_tokens": 8, "ignore_eos": True} | body).encode()
    request = urllib.request.Request(server.url + "/v1/completions", sent, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            status, read = reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    return status, read if body.get("stream") else json.loads(read)["choices"][0]["text"]
