"""Diffusion forcing against the authors' own sampler (arXiv 2510.14961), token for token.

`golden/diffusion.json` holds settings, prompts, and the tokens and core passes of `generate_diffusion_style` of their
repository, seal-rg/recurrent-pretraining, in float32, with states that start at zero and without noise, after two
corrections: it freezes the longest converged prefix, where theirs freezes up to the furthest converged position; and a
position is compared with its own state of the step before, where theirs, once positions have frozen, compares it with
that of a position to its right. No answer in it comes nearer than 1e-4 to a tie.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopwise.cli import main
from loopwise.model import RecurrentDepthForCausalLM
from loopwise.serve import Engine, Params
from loopwise.serve.engine.diffusion_settings import DiffusionSettings
from tests.helpers.huginn_tiny import write

CASES = json.loads((Path(__file__).parent / "golden" / "diffusion.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("huginn")
    write(out / "source")
    assert main(["convert", str(out / "source"), str(out / "imported")]) == 0
    return out / "imported"


@pytest.mark.parametrize("policy", ["single", "modulo-2"])
def test_freezes_the_authors_tokens(folder, policy):
    model: Any = RecurrentDepthForCausalLM.from_pretrained(folder, state_init="zeros")
    engine = Engine(model, max_num_seqs=16, max_model_len=100, kv_policy=policy, max_recurrences=64, max_in_flight=128)
    cases = [case for case in CASES if case["kv_policy"] == policy]
    knobs = ("inner", "threshold", "ema", "continuous")
    params = [
        Params(
            max_tokens=len(case["tokens"]),
            num_recurrences=64,
            ignore_eos=True,
            decoder="diffusion",
            max_in_flight=case["wave"],
            diffusion=DiffusionSettings(**{name: case[name] for name in knobs}),
        )
        for case in cases
    ]
    got = engine.generate([case["prompt"] for case in cases], params)
    assert [(c.tokens, c.passes) for c in got] == [(case["tokens"], case["passes"]) for case in cases]
    assert len(cases) > 8
