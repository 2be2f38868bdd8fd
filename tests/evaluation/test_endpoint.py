"""`loopwise eval` through a server: its requests, its counts and its errors."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from loopwise.cli import main
from loopwise.evaluation.answers import Answer, Sequences, conversations
from loopwise.evaluation.recipe import Evaluate
from loopwise.train.tasks import Source, parse, tokenizer
from tests.helpers.json_server import JsonHandler, answering
from tests.helpers.train_tiny import run, save_recurrent

SOURCE = "task:hops?hops=1+2+4&lookups=0&questions=1&records=30"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    known = tokenizer("hops")
    return save_recurrent(tmp_path_factory.mktemp("endpoint") / "model", known, {"vocab_size": len(known)})


@pytest.fixture
def server():
    """A server whose model solves as many hops as it has recurrences, and needs one more to notice.

    It refuses bodies with `temprature`. Gives its URL, and the bodies that it was sent.
    """
    known = tokenizer("hops")
    problems = {}
    for record in parse(f"{SOURCE}&split=held-out").records():
        question, answer = (message["content"] for message in record["messages"])
        problems[tuple(known(question)["input_ids"])] = answer, record["hops"][0]
    bodies = []

    class Handler(JsonHandler):
        def do_GET(self):
            if self.path != "/v1/models":
                self.reply(404, {"error": {"message": "Not Found"}})
                return
            self.reply(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

        def do_POST(self):
            body = self.body()
            bodies.append(body)
            if "temprature" in body:
                self.reply(400, {"error": {"message": "temprature: did you mean temperature?"}})
                return
            answer, hops = problems[tuple(body["prompt"])]
            depth = body["num_recurrences"]
            text = answer if depth >= hops else "!"
            spent = min(depth, hops + 1) if "exit_rule" in body else depth
            usage: dict[str, Any] = {
                "prompt_tokens": len(body["prompt"]),
                "completion_tokens": 1,
                "total_tokens": len(body["prompt"]) + 1,
            }
            usage["recurrences"] = {"mean": float(spent), "total": spent}
            choice = {"index": 0, "text": text, "finish_reason": "length"}
            self.reply(
                200, {"id": "0", "object": "text_completion", "model": "tiny", "choices": [choice], "usage": usage}
            )

    with answering(Handler) as url:
        yield url, bodies


def test_answers_of_a_server_are_counted_by_group_and_depth(model, server, tmp_path, capsys):
    pytest.importorskip("openai")
    url, bodies = server
    out = tmp_path / "served.json"
    asked = ["eval", str(model), f"data={SOURCE}", "group=hops", f"endpoint={url}", "--out", str(out)]
    run([*asked, "num_recurrences=1,3", "batch_size=4"])
    result = json.loads(out.read_text())
    assert [row["num_recurrences"] for row in result["results"]] == [1, 3]
    assert [[row["groups"][name]["accuracy"] for name in ("1", "2", "4")] for row in result["results"]] == [
        [1, 0, 0],
        [1, 1, 0],
    ]
    assert [row["mean_recurrences"] for row in result["results"]] == [1, 3]
    assert [row["accuracy"] for row in result["results"]] == pytest.approx([1 / 3, 2 / 3])
    assert len(bodies) == 60
    assert all(body["max_tokens"] == 1 and body["temperature"] == 0 for body in bodies)
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].split()[:9] == ["3", "100.0", "100.0", "0.0", "66.7", "3.00", "3.00", "3.00", "3.00"]

    run([*asked, "num_recurrences=16", "request.exit_rule=cosine", "request.exit_threshold=0.05", "limit=12"])
    [row] = json.loads(out.read_text())["results"]
    assert {name: group["mean_recurrences"] for name, group in row["groups"].items()} == {"1": 2, "2": 3, "4": 5}
    assert len(bodies) == 72
    assert {"exit_rule": "cosine", "exit_threshold": 0.05, "num_recurrences": 16}.items() <= bodies[-1].items()
    run(["plot", "depth", str(out), "--out", str(tmp_path / "depth.png")])
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["endpoint=URL", "request.temprature=1"], "request.temprature: choose from min_recurrences, "),
        (["endpoint=http://127.0.0.1:9/v1"], "no OpenAI-compatible server answers there"),
        (["endpoint=BARE"], "HTTP 404: Not Found; its address usually ends in /v1: http://127.0.0.1:"),
        (["endpoint=http://127.0.0.1:9/"], "; its address usually ends in /v1: http://127.0.0.1:9/v1"),
        (["endpoint=http://localhost:PORT/v1"], "endpoint=http://localhost:PORT/v1: no address of a server"),
        (["endpoint=URL", "request.stream=true"], "request.stream: choose from min_recurrences, "),
        (["request.exit_rule=cosine"], "has no effect: its fields are sent to a server, and endpoint names none"),
        (["endpoint=URL", "precision=bfloat16"], "precision=bfloat16 has no effect: the server sets its own"),
        (["endpoint=URL", "request.num_recurrences=3"], "give num_recurrences, which takes several"),
        (["endpoint=URL", "data=TEXT"], "measures answers, and text has none"),
    ],
)
def test_what_cannot_be_asked_is_one_line(settings, message, model, server, tmp_path, capsys):
    pytest.importorskip("openai")
    (tmp_path / "text.txt").write_text("a=1;" * 40)
    settings = [s.replace("BARE", server[0].removesuffix("/v1")) for s in settings]
    settings = [s.replace("URL", server[0]).replace("TEXT", str(tmp_path / "text.txt")) for s in settings]
    assert main(["eval", str(model), f"data={SOURCE}", *settings]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1]
    assert len(told) == 1


def test_depths_are_drawn_of_a_server_s_answers_alone(tmp_path, capsys):
    (tmp_path / "text.json").write_text(
        json.dumps({"results": [{"num_recurrences": 1, "loss": 2.0, "loss_error": None}]})
    )
    assert main(["plot", "depth", str(tmp_path / "text.json")]) == 2
    assert "no recurrences of groups in it" in capsys.readouterr().err


def test_a_limit_spreads_over_the_data():
    """Blocks of text evenly. Of conversations whose eight groups take turns, all groups are measured."""
    ids = [np.array([i, i + 1, i + 2]) for i in range(2000)]
    learned = [np.ones(3, bool)] * 2000
    some = Sequences(ids[:10], learned[:10], []).spread(4)
    assert [of_one[0] for of_one in some.ids] == [0, 2, 5, 7]
    assert len(some.spread(9).ids) == 4
    answers = [Answer(i, 1, 2, str(i % 8)) for i in range(2000)]
    some = Sequences(ids, learned, answers).spread(250)
    assert [of_one[0] for of_one in some.ids] == sorted({int(of_one[0]) for of_one in some.ids})
    assert [answer.group for answer in some.answers] == [str(of_one[0] % 8) for of_one in some.ids]
    counts = Counter(answer.group for answer in some.answers)
    assert len(counts) == 8
    assert min(counts.values()) > 15


def test_a_limit_of_a_generated_task_draws_no_more(model, tmp_path, monkeypatch, capsys):
    """The first records of each source, in turn; a file is read whole."""
    sources = [SOURCE, f"{SOURCE}&seed=5&lookups=1".replace("lookups=0&", "")]
    recipe = Evaluate(data=sources, group="hops")
    whole = conversations(recipe, tokenizer("hops")).some([0, 1, 2, 33, 34, 35, 36])
    drawn = []
    draw = Source.record
    monkeypatch.setattr(Source, "record", lambda self, number: drawn.append(number) or draw(self, number))
    some = conversations(recipe.model_copy(update={"limit": 7}), tokenizer("hops"))
    assert [ids.tolist() for ids in some.ids] == [ids.tolist() for ids in whole.ids]
    assert some.answers == whole.answers
    assert drawn == [0, 1, 2, 3, 4, 5, 6]
