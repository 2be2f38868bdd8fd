"""`loopwise eval tasks=... endpoint=URL`: the requests that a server gets, its counts, and its errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loopwise.cli import main
from loopwise.train.tasks import tokenizer
from tests.helpers.json_server import JsonHandler, answering
from tests.helpers.train_tiny import run


@pytest.fixture
def server():
    """A server that answers `x` from R=2 on, `y` below, and spends half the recurrences under an exit rule.

    R=9 is refused. Gives its URL, and the bodies that it was sent.
    """
    bodies = []

    class Handler(JsonHandler):
        def do_GET(self):
            self.reply(200, {"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": 60}]})

        def do_POST(self):
            body = self.body()
            bodies.append(body)
            depth = body["num_recurrences"]
            if depth == 9:
                self.reply(400, {"error": {"message": "num_recurrences=9: an integer from 1 to 8"}})
                return
            spent = depth / 2 if "exit_rule" in body else float(depth)
            prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
            text = "x" if depth > 1 else "y"
            choices = [{"index": n, "text": text, "finish_reason": "stop"} for n in range(len(prompts))]
            read, made = sum(map(len, prompts)), len(prompts)
            usage: dict[str, Any] = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
            usage["recurrences"] = {"mean": spent, "total": spent * made}
            self.reply(200, {"object": "text_completion", "model": "tiny", "choices": choices, "usage": usage})

    with answering(Handler) as url:
        yield url, bodies


def test_every_request_carries_its_depth_and_the_fields_of_the_recipe(asked, server, tmp_path, capsys):
    pytest.importorskip("tenacity")
    url, bodies = server
    questions = ["abc", "bcde", "f"]
    lines = [json.dumps({"question": text, "answer": "x"}) for text in questions]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    out = tmp_path / "served.json"
    given = ["eval", str(asked / "model"), f"tasks={tmp_path}/few.jsonl", f"endpoint={url}", "--out", str(out)]
    given += ["gen_kwargs.max_gen_toks=5"]
    for size in (1, 2):  # requests at once
        run([*given, "num_recurrences=1,4", f"batch_size={size}", "--force"])
        found = json.loads(out.read_text())["results"]
        assert [(row["num_recurrences"], row["score"], row["mean_recurrences"]) for row in found] == [
            (1, 0, 1),
            (4, 1, 4),
        ]
        known = tokenizer("hops")
        assert [row["tokens"] for row in found] == [sum(len(known(text).input_ids) + 1 for text in questions)] * 2
        # Each depth is tried by a request of one token before the first question.
        assert sorted(body["num_recurrences"] for body in bodies) == [1] * 4 + [4] * 4
        asked_for = [body for body in bodies if body["max_tokens"] == 5]
        assert len(asked_for) == 6
        assert all(body["temperature"] == 0 and "\n" in body["stop"] and body["model"] == "tiny" for body in asked_for)
        bodies.clear()
    run([*given, "num_recurrences=4", "--force", "request.exit_rule=cosine", "request.exit_threshold=0.05"])
    [row] = json.loads(out.read_text())["results"]
    assert row["mean_recurrences"] == 2
    assert all(body["exit_rule"] == "cosine" and body["exit_threshold"] == 0.05 for body in bodies)
    capsys.readouterr()
    for settings, message in (
        (["num_recurrences=4,9"], f"endpoint={url}: HTTP 400: num_recurrences=9: an integer from 1 to 8"),
        (["endpoint=http://127.0.0.1:9/v1"], "no OpenAI-compatible server answers there"),
        (["gen_kwargs.max_gen_toks=60"], "answers of up to 60 tokens leave no place for a prompt in 59 positions"),
        (["precision=bfloat16"], "has no effect: the server sets its own precision"),
        (["engine=lanes"], "engine=lanes has no effect: the server at endpoint generates"),
    ):
        assert main([*given, "num_recurrences=4", "--force", *settings]) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1
        assert message in told[0]
