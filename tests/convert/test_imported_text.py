"""Imports give the greedy texts of the authors' code: in transformers with and without a cache, and in the lane engine.

They load where Loopwise is not installed.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loopwise.cli import main
from loopwise.serve import Engine, Params
from tests.helpers.convert import GOLDEN, expected, source

# Formats whose expected.safetensors have texts -> keys: those of Parcae are from a state of zeros.
FORMATS: dict[str, list[str]] = {"loopus": [], "parcae": ["state_init=zeros"], "loopformer": []}
DEPTHS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an import of each format."""
    folder = tmp_path_factory.mktemp("imported")
    for name, keys in FORMATS.items():
        assert main(["convert", str(source(name, folder / f"{name}-source")), str(folder / name), *keys]) == 0
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_generate_with_and_without_a_cache(name, folder):
    model: Any = AutoModelForCausalLM.from_pretrained(folder / name).eval()
    want = expected(name)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(want["ids"])
    for depth in DEPTHS:
        for cached in (True, False):
            text = model.generate(want["ids"], attention_mask=mask, num_recurrences=depth, use_cache=cached, **options)
            assert torch.equal(text[:, want["ids"].shape[1] :], want[f"tokens_{depth}"])


@pytest.mark.parametrize("name", FORMATS)
def test_the_lane_engine(name, folder):
    engine, want = Engine(folder / name, max_num_seqs=3, max_model_len=32), expected(name)
    rows = [(depth, row) for depth in DEPTHS for row in range(2)]
    params = [Params(8, depth, temperature=0, exit_rule="fixed", ignore_eos=True) for depth, _ in rows]
    replies = engine.generate([want["ids"][row].tolist() for _, row in rows], params)
    for (depth, row), reply in zip(rows, replies, strict=True):
        assert list(reply.tokens) == want[f"tokens_{depth}"][row].tolist()


def test_where_loopwise_is_not_installed(folder):
    program = """
import sys
sys.modules["loopwise"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True).eval()
    assert "transformers_modules" in type(model).__module__
    want = load_file(f"{sys.argv[1]}/{name}.safetensors")
    for depth in (1, 2, 4, 8):
        with torch.no_grad():
            got = model(want["ids"], num_recurrences=depth, initial_state=want.get("state"), use_cache=False).logits
        torch.testing.assert_close(got, want[f"logits_{depth}"], rtol=0, atol=1e-4)
"""
    for name in FORMATS:
        (folder / f"{name}.safetensors").write_bytes((GOLDEN / name / "expected.safetensors").read_bytes())
    subprocess.run([sys.executable, "-c", program, folder, *FORMATS], cwd=folder, check=True)
