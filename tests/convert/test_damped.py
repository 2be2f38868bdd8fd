"""Conversions that start as their source: damped recurrence, and routers of steps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loopwise.cli import main
from loopwise.convert.export import export
from loopwise.errors import UserError
from tests.helpers.convert import EVERY_LAYER, import_refused, run, tokens
from tests.helpers.tiny import load_source, save_source

DAMPINGS = (0.3, "1/R", "learned")


@pytest.mark.parametrize("damping", DAMPINGS)
def test_a_damped_conversion_is_its_source_at_one_recurrence(damping, tmp_path, capsys):
    source = load_source(save_source(tmp_path / "source"))
    model = run(tmp_path / "source", tmp_path / "out", **EVERY_LAYER, recurrence_damping=damping)
    facts = json.loads((tmp_path / "out" / "loopwise.json").read_text())
    assert facts["plan"]["recurrence_damping"] == model.config.recurrence_damping == damping
    assert facts["max_dlogit"] < 1e-10  # three recurrences among what was compared
    assert f"recurrence_damping={damping}" in (tmp_path / "out" / "README.md").read_text()
    with torch.no_grad():
        assert torch.equal(model(**tokens(False), num_recurrences=1).logits, source(**tokens(False)).logits)
        plain = run(tmp_path / "source", tmp_path / "plain", **EVERY_LAYER)
        assert (model(**tokens(False)).logits - plain(**tokens(False)).logits).abs().max() > 1e-3
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert f"\ndamping {damping}\n" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "plain")]) == 0
    assert "damping" not in capsys.readouterr().out


def test_a_damped_model_is_exported_at_one_recurrence(tmp_path, capsys):
    source = load_source(save_source(tmp_path / "source"))
    run(tmp_path / "source", tmp_path / "out", **EVERY_LAYER, recurrence_damping="learned")
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "plain"), "--unroll", "2"]) == 2
    assert "recurrence_damping=learned: each recurrence takes a share" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()
    assert export(tmp_path / "out", tmp_path / "plain", unroll=1) == {"float32": 0}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        assert torch.equal(plain(**tokens(False)).logits, source(**tokens(False)).logits)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_verification_finds_a_wrong_damping(damping, tmp_path, monkeypatch):
    monkeypatch.setattr("loopwise.model.damping.interpolate", lambda before, after, share: after)
    save_source(tmp_path / "source")
    with pytest.raises(UserError, match="at 3 recurrences the written model, reloaded, and the source's layers"):
        run(tmp_path / "source", tmp_path / "out", **EVERY_LAYER, recurrence_damping=damping)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text"])
def test_beside_a_lora_and_a_norm(model_type, tmp_path):
    """Verified against the source's layers at the plan's R; so is any architecture's way to call its layers."""
    keys: dict[str, Any] = {"method": "recursive", "loops": 1 if model_type == "gemma3_text" else 2}
    model = run(
        save_source(tmp_path / "source", model_type),
        tmp_path / "out",
        **keys,
        num_recurrences=2,
        lora={"rank": 4},
        recurrence_norm=True,
        recurrence_damping=0.5,
    )
    assert json.loads((tmp_path / "out" / "loopwise.json").read_text())["max_dlogit"] < 1e-8
    assert model.config.recurrence_norm == "each"


@pytest.mark.parametrize("kind", ["expert", "token"])
def test_a_conversion_with_a_router_of_steps_starts_without_it(kind, tmp_path):
    save_source(tmp_path / "source")
    keys: dict[str, Any] = {"method": "recursive", "loops": 2, "sharing": "middle-cycle"}
    plain = run(tmp_path / "source", tmp_path / "plain", **keys)
    routed = run(tmp_path / "source", tmp_path / "out", **keys, router={"kind": kind, "update": "step"})
    assert routed.config.router["alpha"] == 2  # sigmoid; or softmax of two depths
    with torch.no_grad():
        out = routed(**tokens(False), use_cache=False)
        depth = 2 if kind == "expert" else 1  # of equal weights, token-choice takes the first depth
        assert out.router_outputs.selected.sum(-1).eq(depth).all()
        want = plain(**tokens(False), num_recurrences=depth).logits
        assert (out.logits - want).abs().max() == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["recurrence_damping=2/R"], "recurrence_damping='2/R': a number above 0, at most 1; or one of 1/R, learned"),
        (["recurrence_damping=0"], "recurrence_damping=0: a number above 0"),
        (["recurrence_damping=true"], "recurrence_damping=True: a number above 0"),
        (["recurrence_damping=0.5", "recurrence_residual=true"], "with no recurrence_residual"),
        (["recurrence_damping=0.5", "router.kind=token"], "goes with no router"),
    ],
)
def test_what_is_refused(keys, message, tmp_path, capsys):
    folder = save_source(tmp_path / "source")
    assert message in import_refused(capsys, folder, tmp_path / "out", "sizes=1,3,2", "injection=none", *keys)
