"""The Triton kernels without a GPU: interpreted (tests/helpers/run_triton.py), and compiled for two GPUs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.helpers.repository import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(command: list[str], environment: dict[str, str]) -> str:
    """The output of a command in a new process: Triton reads its environment at import."""
    done = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("some", ["not slow", pytest.param("slow or not slow", marks=pytest.mark.slow)])
def test_interpreted_kernels_equal_the_torch_backend(some):
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", some]
    assert " passed" in run([*tests, str(ROOT / "tests/helpers/run_triton.py")], {"TRITON_INTERPRET": "1"})


COMPILE = """
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from loopwise.serve.engine.attention import triton as triton_attention
from loopwise.serve.engine.attention.base import Rows


class Device:
    def __init__(self, capability: int):
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = self.get_current_stream = lambda *_: 0


class Compiled:
    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args: Any, **kwargs: Any) -> None:
            done = self.kernel.warmup(*args, grid=grid, **kwargs)
            print(self.kernel.__name__, len(done.asm["cubin"]), done.metadata.shared)

        return launch


for name in ("_write", "_attend", "_merge", "_fill"):
    setattr(triton_attention, name, Compiled(getattr(triton_attention, name)))
for capability, dtype, heads, groups, size in ((90, torch.bfloat16, 55, 1, 96), (80, torch.float32, 1, 4, 256)):
    driver.set_active(Device(capability))
    like = torch.zeros(1, dtype=dtype)
    attention = triton_attention.TritonAttention([(heads, size)], 0, 3, 70, 16, like)
    q, k, v = (like.new_zeros(3, n, size) for n in (heads * groups, heads, heads))
    some = torch.arange(3)
    turned = triton_attention.Rotary(like.new_zeros(70, size // 2), capability > 80)
    full = {"sliding_window": 9, "softcap": 2.0, "rotary": turned}
    for alone, write, more in ((True, None, {}), (True, None, {"rotary": turned}), (False, some > 0, full)):
        attention.plan(Rows(torch.zeros(3, 70, dtype=torch.int32), some, some, some, write, alone))
        sinks = None if alone else q[0, :, 0].contiguous()
        attention(0, q, k, v, scaling=0.1, sinks=sinks, **more)
    attention.fill(attention.current, some, int(some.sum()))
"""


def test_kernels_compile_for_gpus(tmp_path):
    out = run([sys.executable, "-c", COMPILE], {"TRITON_CACHE_DIR": str(tmp_path)})
    kernels = [line.split() for line in out.splitlines()]
    assert {name for name, *_ in kernels} == {"_write", "_attend", "_merge", "_fill"}
    assert all(int(size) > 0 and int(shared) <= 99 * 1024 for _, size, shared in kernels)
