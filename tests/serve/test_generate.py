"""`loopwise generate`: prompts in, text or JSON lines out."""

from __future__ import annotations

import io
import json
import shutil

import pytest

from loopwise.cli import main
from loopwise.serve import Engine
from tests.helpers.tiny import save_source


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    source = save_source(folder / "source")
    keys = ["sizes=1,2,1", "num_recurrences=3", "kv_policy=last-exited", "exit.rule=latent-diff", "exit.threshold=0.5"]
    assert main(["convert", str(source), str(folder / "model"), *keys]) == 0
    return folder / "model"


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_text_and_details(model, capsys, monkeypatch):
    keys = ["max_tokens=6", "details=true"]
    capsys.readouterr()
    assert main(["generate", str(model), "prompt=the cat", *keys]) == 0
    one = lines(capsys)[0]
    assert len(one["tokens"]) == len(one["depths"]) <= 6
    assert set(one["depths"]) <= {1, 2, 3}
    assert min(one["depths"][1:]) < 3  # the model's own exit rule
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\ndef f(x):\n"))
    assert main(["generate", str(model), *keys]) == 0
    two = lines(capsys)
    assert two[0] == one
    assert two[1]["prompt"] == "def f(x):"
    assert (
        main(
            [
                "generate",
                str(model),
                "prompt=the cat",
                "max_tokens=6",
                "decoder=wave",
                "max_in_flight=3",
                "details=true",
            ]
        )
        == 0
    )
    wave = lines(capsys)[0]
    assert (wave["tokens"], wave["depths"]) == (one["tokens"], one["depths"])
    assert main(["generate", str(model), "prompt=the cat", "max_tokens=6"]) == 0
    assert capsys.readouterr().out == f"the cat{one['text']}\n"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["exit_rule=latent-dif"], "did you mean 'latent-diff'"),
        (["num_recurrences=99"], "num_recurrences=99: this engine runs 1 to 8"),
        (["exit_rule=gate"], "no exit gate"),
        (["kv_policy=singel"], "kv_policy='singel'"),
        (["decoder=wave", "kv_policy=single"], "kv_policy=single does not keep"),
        (["prompt="], "a prompt is empty"),
        (["temperature=-1"], "temperature"),
        (["max_model_length=3"], "max_model_len"),
    ],
)
def test_bad_input_is_one_line(model, capsys, keys, told):
    capsys.readouterr()
    assert main(["generate", str(model), *([] if "prompt=" in keys else ["prompt=the cat"]), *keys]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_model_without_a_tokenizer_continues_ids(model, tmp_path, capsys):
    folder = tmp_path / "m"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    ids = [[5, 6, 7]]
    (got,), (want,) = Engine(folder).generate(ids), Engine(model).generate(ids)
    assert (got.tokens, got.depths, got.text) == (want.tokens, want.depths, "")
    assert main(["generate", str(folder), "prompt=a"]) == 2
    assert "a prompt in words needs the model's tokenizer" in capsys.readouterr().err
