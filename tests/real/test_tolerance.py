"""Verification on SmolLM2: rounding of real logits is no fault, and each seeded fault is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopwise.cli import main
from loopwise.convert import ConvertRecipe, convert
from loopwise.convert.export import export
from loopwise.errors import UserError
from loopwise.recipe import validate
from tests.helpers.convert import RELAXED, written
from tests.helpers.faults import FAULTS

pytestmark = pytest.mark.real
FULL = {"q": 576, "k": 192, "v": 192, "o": 576, "gate": 576, "up": 576, "down": 576}


@pytest.fixture(scope="module")
def relaxed(smollm2_hf: Path, tmp_path_factory):
    out = tmp_path_factory.mktemp("relaxed") / "out"
    with written(smollm2_hf, out, **{**RELAXED, "lora": {"rank": 16}}) as made:
        yield made, out


def test_what_is_right_is_accepted(relaxed):
    made, out = relaxed
    found = made.verify(out)
    assert found["float64"] < 1e-10 < 1e-6 < found["float32"]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, relaxed):
    made, out = relaxed
    with FAULTS[fault](out), pytest.raises(UserError, match="verification failed"):
        made.verify(out)


def test_the_headline_method(smollm2_hf, tmp_path, capsys):
    """Converted, exported, and said to be so: real logits of float32 differ by more than 1e-4."""
    argv = ["convert", str(smollm2_hf), str(tmp_path / "out"), "method=recursive", "loops=2", "lora.rank=64"]
    assert main(argv) == 0
    facts = json.loads((tmp_path / "out" / "loopwise.json").read_text())
    assert facts["max_dlogit"] == facts["max_dlogit_by_dtype"]["float64"] < 1e-10
    assert "(float32), " in (tmp_path / "out" / "README.md").read_text()
    assert "(float64)" in capsys.readouterr().out
    found = export(tmp_path / "out", tmp_path / "plain", unroll=2)
    assert found is not None
    assert found["float64"] < 1e-2  # merged weights are rounded to float32


@pytest.mark.parametrize(
    ("keys", "dtypes"),
    [
        ({**RELAXED, "lora": {"rank": FULL}}, {"float32", "float64"}),
        ({**RELAXED, "lora": {"rank": 16}, "dtype": "bfloat16"}, {"bfloat16", "float64"}),
        ({"method": "mor", "loops": 2, "lora": {"rank": 4}, "dtype": "bfloat16"}, {"bfloat16", "float64"}),
        ({"sizes": [12, 4, 14]}, {"float32"}),
        ({"sizes": [10, 10, 10], "dtype": "bfloat16"}, {"bfloat16"}),
    ],
)
def test_rounding_is_no_fault(keys: dict[str, Any], dtypes, smollm2_hf, tmp_path):
    facts = convert(smollm2_hf, tmp_path / "out", validate(ConvertRecipe, keys))
    assert facts["max_dlogit_by_dtype"].keys() == dtypes
    assert facts["max_dlogit"] < 1e-10
