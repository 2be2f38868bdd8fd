"""`recurrence_norm=between`: a conversion with the source's final norm between recurrences."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loopwise.cli import main
from loopwise.convert import ConvertRecipe
from loopwise.convert.export import export
from loopwise.errors import UserError
from loopwise.recipe import validate
from loopwise.serve import Engine, Params
from tests.helpers.convert import EVERY_LAYER, import_refused, run, tokens
from tests.helpers.tiny import load_source, save_source

BETWEEN: dict[str, Any] = {**EVERY_LAYER, "recurrence_norm": "between"}


@pytest.mark.parametrize(("injection", "damping"), [("none", 1.0), ("none", 0.3), ("linear", 1.0), ("decayed", 1.0)])
def test_one_recurrence_is_the_source(injection, damping, tmp_path, capsys):
    source = load_source(save_source(tmp_path / "source"))
    keys = {**BETWEEN, "injection": injection, "recurrence_damping": damping}
    model = run(tmp_path / "source", tmp_path / "out", **keys)
    facts = json.loads((tmp_path / "out" / "loopwise.json").read_text())
    assert facts["plan"]["recurrence_norm"] == model.config.recurrence_norm == "between"
    assert facts["max_dlogit"] < 1e-10  # with injection=none, three recurrences among what was compared
    assert "Norm of recurrences: `between`." in (tmp_path / "out" / "README.md").read_text()
    with torch.no_grad():
        assert torch.equal(model(**tokens(False), num_recurrences=1).logits, source(**tokens(False)).logits)
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "\nnorm between\n" in capsys.readouterr().out


def test_states_stay_bounded_over_32_recurrences(tmp_path):
    """The core adds to its state, so that without a norm the state of a residual network only grows."""
    save_source(tmp_path / "source")
    norms = {}
    for name, more in (("between", {}), ("none", {"recurrence_norm": False})):
        model = run(tmp_path / "source", tmp_path / name, **{**BETWEEN, **more, "max_recurrences": 32})
        with torch.no_grad():
            norms[name] = [model(**tokens(False), num_recurrences=r).state.norm(dim=-1).max() for r in (2, 8, 16, 32)]
    assert max(norms["between"]) < 1.5 * norms["between"][0]
    assert norms["none"][-1] > 3 * norms["none"][0]


def test_verification_finds_a_missing_norm(tmp_path, monkeypatch):
    monkeypatch.setattr("loopwise.model.recurrence.norm_before", lambda kind, s, norm, started: s)
    save_source(tmp_path / "source")
    with pytest.raises(UserError, match="at 3 recurrences the written model, reloaded, and the source's layers"):
        run(tmp_path / "source", tmp_path / "out", **BETWEEN)


def test_it_is_exported_at_one_recurrence(tmp_path, capsys):
    source = load_source(save_source(tmp_path / "source"))
    run(tmp_path / "source", tmp_path / "out", **BETWEEN)
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "plain"), "--unroll", "2"]) == 2
    assert "recurrence_norm='between': a norm stands between two recurrences" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()
    assert export(tmp_path / "out", tmp_path / "plain", unroll=1) == {"float32": 0}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        assert torch.equal(plain(**tokens(False)).logits, source(**tokens(False)).logits)


def test_it_is_trained_and_served_as_the_model_is(tmp_path):
    save_source(tmp_path / "source")
    run(tmp_path / "source", tmp_path / "out", **{**BETWEEN, "injection": "linear"})
    (tmp_path / "text.txt").write_text("the core runs again while depth grows " * 40)
    keys = ["data.sequence_length=16", "batch_size=2", "steps=2", "recurrence.mean=3"]
    trained = tmp_path / "trained"
    assert main(["train", str(tmp_path / "out"), str(trained), f"data.train={tmp_path / 'text.txt'}", *keys]) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(trained).eval()
    assert model.config.recurrence_norm == "between"
    prompt = [5, 9, 14, 3, 8]
    for depth in (1, 4):
        (reply,) = Engine(trained, max_num_seqs=2, max_model_len=32).generate(
            [prompt], Params(temperature=0, max_tokens=6, num_recurrences=depth, exit_rule="fixed", ignore_eos=True)
        )
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                logits = model(torch.tensor([ids]), num_recurrences=depth, use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
        assert list(reply.tokens) == ids[len(prompt) :]


def test_a_source_with_its_final_norm_elsewhere_is_refused(tmp_path, capsys):
    folder = save_source(tmp_path / "source", "gpt2")
    keys = ["sizes=1,3,2", "recurrence_norm=between"]
    line = import_refused(capsys, folder, tmp_path / "out", *keys)
    assert "recurrence_norm=between: this gpt2 has no final norm model.norm" in line


def test_values(tmp_path, capsys):
    found = {value: validate(ConvertRecipe, {"recurrence_norm": value}).recurrence_norm for value in (True, "yes")}
    assert found == {True: True, "yes": True}  # as ever
    folder = save_source(tmp_path / "source")
    line = import_refused(capsys, folder, tmp_path / "out", "sizes=1,3,2", "recurrence_norm=last")
    assert "recurrence_norm='last': true, false or between" in line
    line = import_refused(capsys, folder, tmp_path / "out", "method=mor", "loops=2", "recurrence_norm=between")
    assert "recurrence_norm='between' goes with no router" in line
