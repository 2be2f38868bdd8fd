"""The image `serve` has less than half the packages of the other, and serves: with those packages and no others."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import urllib.request
from typing import Any

import pytest

from supply import locks
from supply.serving import needed
from tests.helpers import part_of_environment
from tests.helpers.repository import ROOT
from tests.helpers.serve_tiny import GROUPED, RETROFIT, save, source_config
from tests.helpers.serving import serving

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or sys.version_info[:2] != (3, 11),
    reason="vLLM is not installed, or the image has another Python",
)


def serving_pins() -> dict[str, locks.Pin]:
    return {pin.name: pin for pin in locks.read(locks.LOCKS["serve"])}


def test_serving_needs_less_than_half_of_the_packages():
    torch = 1  # installed before the locks: its build for CPUs is not in them
    whole = [pin for pin in locks.read(locks.PINS) if pin.applies()]
    assert 80 < len(serving_pins()) + torch < len(whole) / 2


def test_the_lock_for_serving_is_that_part_of_the_cpu_lock():
    cpu = {pin.requirement: pin for pin in locks.read(locks.LOCKS["cpu"])}
    pins = serving_pins()
    assert all(cpu[pin.requirement] == pin for pin in pins.values())
    assert set(pins) == needed() - {"torch"}, "run python -m supply.serving"


def ask(url: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return reply.read().decode() if body.get("stream") else json.load(reply)


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_a_server_with_these_packages_alone_answers(tmp_path, monkeypatch):
    python = part_of_environment.make(tmp_path / "environment", {*serving_pins(), "torch", "loopwise"})
    found = subprocess.run([python, "-c", "import matplotlib"], capture_output=True, text=True)
    assert "No module named 'matplotlib'" in found.stderr, "the environment holds no other packages"
    folder = tmp_path / "tiny"
    save(folder, source_config("llama", **GROUPED), **RETROFIT)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert os.environ.get("PYTHONHOME") is None
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 8}
    with serving(folder) as server:
        whole = ask(server.url, "/v1/completions", **body, num_recurrences=2, return_recurrences=True)
        assert whole["usage"]["completion_tokens"] == 8
        chunks = ask(server.url, "/v1/completions", **body, stream=True, exit_rule="kl")
        assert chunks.rstrip().endswith("[DONE]")
        digits = {"structured_outputs": {"regex": "[0-9]{9}"}}  # longer than the answer, as this model has no end
        answer = ask(server.url, "/v1/completions", **body, **digits)
        assert answer["choices"][0]["text"].isdigit()
        chat = [{"role": "user", "content": "a"}]
        said = ask(server.url, "/v1/chat/completions", model="tiny", messages=chat, max_tokens=4)
        assert said["choices"][0]["message"]["role"] == "assistant"
        for path in ("/metrics", "/depth", "/v1/depth", "/health"):
            assert urllib.request.urlopen(server.url + path, timeout=30).status == 200
