"""Memory of exit rules that compare distributions: one row a request, whatever the settings, and counted."""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from loopwise.serve import Engine, Params
from tests.helpers.engines import build

SHARE = 1.05
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # KV policy, model, request
    "plain": ("per-depth", {}, {}),
    "waves": ("per-depth", {}, {"decoder": "wave", "max_in_flight": 8}),
    "prompts that exit": ("last-exited", {"core": [1, 2, 3], "coda": []}, {"prompt_exit": True}),
}


def tensor_bytes() -> int:
    """Bytes of the storages of all tensors that Python holds."""
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}.values())


def resident_bytes() -> int:
    """Resident memory of this process, without what malloc keeps for later."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize(("rows", "vocabulary"), [(24, 8192), pytest.param(256, 131_072, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_all_requests_in_kl_take_one_distribution_each(name, rows, vocabulary):
    policy, fields, request = CASES[name]
    model = build(source={"vocab_size": vocabulary}, **fields)
    engine = Engine(model, max_num_seqs=rows, max_model_len=24, kv_policy=policy, max_in_flight=8, passes_per_step=3)
    prompts = [[5 + n % 50, 6, 7, 8] for n in range(rows)]

    def run(rule: str) -> None:
        params = Params(2, 3, exit_rule=rule, ignore_eos=True, **request)
        assert all(len(each.tokens) == 2 for each in engine.generate(prompts, params))

    run("argmax-stability")  # reads logits, too: what every read-out of so many lanes leaves behind is there
    start, resident, counted = tensor_bytes(), resident_bytes(), engine.loop.nbytes
    for rule in ("kl", "minp-kl"):
        run(rule)
    bound = int(rows * vocabulary * 4 * SHARE)
    assert tensor_bytes() - start <= bound
    if vocabulary > 100_000:  # a small table drowns in the rest of the process
        assert resident_bytes() - resident <= bound
    assert engine.loop.nbytes == counted >= engine.loop.state.nbytes + rows * vocabulary * 4
