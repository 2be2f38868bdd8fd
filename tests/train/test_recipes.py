"""Every shipped recipe runs for a few steps on a tiny model of its kind."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch

from loopwise.recipe import RECIPES
from tests.helpers.train_tiny import history, run, save_recurrent, weights

RELAXED = {"relaxation": {"depths": 2, "rank": {"self_attn.q_proj": 4}, "own": ["input_layernorm.weight"]}}
BODY = ("core", "source", "prelude", "coda")
GATED = {"exit_gate": True, "recurrence_norm": "between"}
OWN_DATA = ["data.window=20"]  # of a recipe that names its sources itself
NO_INJECTION = {"injection": "none", "num_recurrences": 2}
# recipe -> the model, what the user sets beside data and steps, and the roles of what must have moved.
KINDS: dict[str, tuple[dict[str, Any] | None, list[str], set[str]]] = {
    "base": (None, [], {"model"}),
    "demo": ({}, [], {"core"}),
    "distill": (
        {**RELAXED, **NO_INJECTION},
        ["objectives.distillation.teacher=PLAIN"],
        {"relaxation", *BODY},
    ),
    "hops": ({}, OWN_DATA, {"injection", *BODY}),
    "hops-code": ({}, [*OWN_DATA, "data.sequence_length=64"], {"injection", *BODY}),
    "hops-base": (None, OWN_DATA, {"model"}),
    "lora-healing": ({**RELAXED, **NO_INJECTION}, [], {"relaxation", *BODY}),
    "mor-expert": (
        {"router": {"kind": "expert", "depths": 2, "auxiliary": True}, **NO_INJECTION},
        [],
        {"router", *BODY},
    ),
    "mor-token": (
        {"router": {"kind": "token", "depths": 2}, **NO_INJECTION},
        [],
        {"router", *BODY},
    ),
    "ouro-1": (
        {**GATED, **NO_INJECTION},
        [],
        {"exit_gate", *BODY},
    ),
    "ouro-2": ({**GATED, **NO_INJECTION}, [], {"exit_gate"}),
    "recursive": (NO_INJECTION, [], {*BODY}),
    "retrofit": (
        {"state_init": "normal"},
        ["data.phases=[{share: 0.5, sources: {TEXT: 1}}, {share: 0.5, sources: {TEXT: 1, MORE: 1}}]"],
        {"injection", *BODY},
    ),
    "sft": ({}, ["data.train=CHATS"], {"injection", *BODY}),
}
FEW = ["steps=4", "batch_size=2", "gradient_accumulation=2", "log_every=1", "data.sequence_length=32"]

GENERATED = ("hops", "hops-base", "hops-code")  # their data are in the recipe


@pytest.fixture(scope="module")
def texts(tmp_path_factory, text) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    for name, documents in {"TEXT": text, "MORE": text[::-1]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    chats = [[{"role": "user", "content": d[:20]}, {"role": "assistant", "content": d[20:80]}] for d in text]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (folder / "CHATS.jsonl").write_text("\n".join([*lines[:5], '{"messages": 3}', *lines[5:]]) + "\n")
    return {name: str(folder / f"{name}.jsonl") for name in ("TEXT", "MORE", "CHATS")}


def test_every_recipe_is_tested():
    assert sorted(KINDS) == sorted(path.stem for path in (RECIPES / "train").glob("*.yaml"))


@pytest.mark.parametrize("recipe", KINDS)
def test_recipe(recipe, plain, texts, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(texts["TEXT"], "text.jsonl")  # the name in hops-code
    changes, settings, moved = KINDS[recipe]
    model = plain if changes is None else save_recurrent(tmp_path / "model", tokenizer, **changes)
    for name, path in {**texts, "PLAIN": str(plain)}.items():
        settings = [setting.replace(name, path) for setting in settings]
    if not any(setting.startswith(("data.train", "data.phases")) for setting in settings) and recipe not in GENERATED:
        settings = [*settings, f"data.train={texts['TEXT']}"]
    run(["train", str(model), str(tmp_path / "out"), "--recipe", recipe, *FEW, *settings])
    losses = history(tmp_path / "out")
    assert len(losses) == 4
    assert all(0 < loss < 7 for loss in losses)
    before, after = weights(model), weights(tmp_path / "out")
    assert {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])} == moved
    if recipe == "sft":
        assert "CHATS.jsonl:6: field 'messages': a conversation is a list" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "gemma"])
def test_retrofit_of_the_papers_architectures(model_type, texts, tmp_path):
    """Converted as in the paper (TinyLlama and Llama-3.2 are llamas), then trained by the recipe; Gemma as RRT does."""
    from tests.helpers.tiny import save_source

    source = save_source(tmp_path / "source", model_type)
    keys = (
        ["method=recursive", "loops=2", "lora.rank=4"] if model_type == "gemma" else ["sizes=1,2,1", "injection=linear"]
    )
    run(["convert", str(source), str(tmp_path / "model"), *keys])
    recipe = "distill" if model_type == "gemma" else "retrofit"
    more = [f"objectives.distillation.teacher={source}"] if model_type == "gemma" else []
    data = [f"data.train={texts['TEXT']}", *FEW]
    run(["train", str(tmp_path / "model"), str(tmp_path / "out"), "--recipe", recipe, *data, *more])
    assert len(history(tmp_path / "out")) == 4
