"""`loopwise eval data=.. engine=lanes`: answers of the lane engine, compared with transformers' at every depth."""

from __future__ import annotations

import json

import pytest

from loopwise.cli import main
from loopwise.train.tasks import tokenizer
from tests.helpers.train_tiny import run, save_recurrent

SOURCE = "task:hops?hops=1+2+4&lookups=0&questions=1&records=12"
RUNNING = "task:sums?length=4&answer=running&modulo=4&records=8"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models that answer some questions right, by name: plain recurrence, and an expert-choice router."""
    made = {}
    for name, changes in {
        "recurrent": {},
        "routed": {
            "router": {"kind": "expert", "depths": 3, "capacity": [1.0, 0.6, 0.3], "alpha": 3.0},
            "injection": "none",
        },
    }.items():
        known = tokenizer("sums")
        folder = tmp_path_factory.mktemp("lanes") / name
        made[name] = str(save_recurrent(folder, known, {"vocab_size": len(known), "initializer_range": 0.2}, **changes))
    return made


def measured(arguments: list[str], tmp_path) -> dict:
    out = tmp_path / "result.json"
    run(["eval", *arguments, "--out", str(out)])
    return json.loads(out.read_text())


def test_answers_are_those_of_transformers_at_every_depth(models, tmp_path):
    """Answers of one token, so that a wrong one is followed by none."""
    asked = [models["recurrent"], f"data={SOURCE.replace('records=12', 'records=120')}", "group=hops"]
    asked += ["num_recurrences=1,2,5"]
    lanes = measured([*asked, "engine=lanes", "batch_size=3"], tmp_path)
    ours = measured(asked, tmp_path)
    assert sum(row["accuracy"] for row in ours["results"]) > 0
    for one, other in zip(lanes["results"], ours["results"], strict=True):
        assert one["mean_recurrences"] == one["num_recurrences"] == other["num_recurrences"]
        assert one["groups"].keys() == other["groups"].keys()
        for name, group in one["groups"].items():
            assert group["accuracy"] == other["groups"][name]["accuracy"]
        assert one["tokens_per_second"] > 0
        assert one["passes_per_token"] is None
    assert (lanes["engine"], lanes["kv_policy"], lanes["batch_size"]) == ("lanes", "per-depth", 3)


def test_an_exit_rule_saves_recurrences_and_is_drawn(models, tmp_path, capsys):
    asked = [models["recurrent"], f"data={SOURCE}", "group=hops", "engine=lanes", "num_recurrences=9"]
    asked += ["kv_policy=last-exited", "request.exit_rule=cosine", "request.prompt_exit=true"]
    found = measured([*asked, "request.exit_threshold=0.9"], tmp_path)
    assert all(group["mean_recurrences"] < 9 for group in found["results"][0]["groups"].values())
    assert "in the lane engine, kv_policy=last-exited: 12 answers" in capsys.readouterr().out
    run(["plot", "depth", str(tmp_path / "result.json"), "--out", str(tmp_path / "depth.png")])
    never = measured([*asked, "request.exit_threshold=1.0e-9"], tmp_path)
    assert never["results"][0]["mean_recurrences"] == 9


def test_decoders_spend_fewer_passes_a_token(models, tmp_path):
    asked = [models["recurrent"], f"data={RUNNING}", "engine=lanes", "num_recurrences=8"]
    plain = measured(asked, tmp_path)["results"][0]
    wave = measured([*asked, "request.decoder=wave", "request.max_in_flight=4"], tmp_path)["results"][0]
    assert plain["passes_per_token"] == 8
    assert wave["passes_per_token"] <= 8
    assert wave["accuracy"] == plain["accuracy"]
    fields = ["request.decoder=diffusion", "request.max_in_flight=4", "request.diffusion={inner: 4}"]
    assert measured([*asked, *fields], tmp_path)["results"][0]["passes_per_token"] < 8


def test_a_router_takes_the_best_of_the_sequence_or_by_thresholds(models, tmp_path):
    asked = [models["routed"], f"data={RUNNING}"]
    thresholds = measured([*asked, "router_inference=threshold"], tmp_path)["results"]
    best = measured([*asked, "router_inference=topk"], tmp_path)["results"]
    assert best[0]["loss"] != thresholds[0]["loss"]
    assert measured(asked, tmp_path)["results"] == thresholds  # the default of this model


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["engine=lanes", "data=a.txt"], "engine=lanes generates answers, and text has none"),
        (["engine=lanes", f"data={SOURCE}", "kv_policy=most"], "kv_policy"),
        (["engine=lanes", f"data={SOURCE}", "request.decoder=diffusion", "request.diffusion={inner: 0}"], "inner"),
        ([f"data={SOURCE}", "router_inference=topk"], "router_inference=topk: this model has no expert-choice router"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(more, message, models, capsys):
    assert main(["eval", models["recurrent"], *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("loopwise: error: ")
    assert said.count("\n") == 1
