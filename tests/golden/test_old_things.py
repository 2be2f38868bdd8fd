"""Files of commit fe1419e: its checkpoints, a stopped run, recipes and request bodies keep their meaning.

`fe1419e/README.md` names the files and how they were made.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loopwise.cli import main
from loopwise.deprecated import RECIPE_KEYS
from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.model.configuration_fields import FORMAT_VERSION
from loopwise.recipe import load_recipe
from tests.helpers.blocked import without

OLD = Path(__file__).parent / "fe1419e"
CHECKPOINTS = ("recursive", "retrofit", "mor")
# Recipe keys whose default has changed on purpose: (then, now). Left out, they mean what docs/ says today.
DEFAULTS = {
    "convert.init": ("stepwise", None),  # None: stepwise, but average with a LoRA of high rank
    "generate.max_tokens": (64, None),  # None: of generation_config.json, or 64; the next three likewise
    "generate.temperature": (0.0, None),
    "generate.top_p": (1.0, None),
    "generate.top_k": (0, None),
}
# The old commit's own files of the model compute the logits, in a process without loopwise.
STRANGER = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    expected = load_file(f"expected/{name}.safetensors")
    with torch.no_grad():
        made = {
            key: model(expected["ids"], num_recurrences=int(key.removeprefix("logits_"))).logits
            for key in expected if key != "ids"
        }
    save_file(made, f"{name}.stranger.safetensors")
try:
    AutoModelForCausalLM.from_pretrained("newer", trust_remote_code=True)
except ValueError as error:
    print(error)
assert "loopwise" not in sys.modules
"""

pytestmark = pytest.mark.xdist_group("golden")  # the tests share what a stranger computed


def copy_files(to: Path) -> Path:
    """The golden files in the directory `to`, with the model's files in every checkpoint, as they were written."""
    shutil.copytree(OLD, to)
    for directory in (*CHECKPOINTS, "run/checkpoint-4"):
        shutil.copytree(to / "travelling", to / directory, dirs_exist_ok=True)
    return to


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the files, as the current directory: recipes name files beside it."""
    copy = copy_files(tmp_path / "old")
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    """A copy of the files, and in it the logits that the old model files compute on this machine.

    `newer` is a checkpoint with today's model files and a later format version; `newer.txt` is what it was refused by.
    """
    folder = copy_files(tmp_path_factory.mktemp("stranger") / "old")
    save_newer(folder / "retrofit", folder / "newer")
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", without("loopwise", STRANGER), *CHECKPOINTS]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "newer.txt").write_text(done.stdout)
    return folder


def save_newer(old: Path, newer: Path) -> None:
    """A checkpoint of today's model files, as a loopwise of the next format version would have written it."""
    RecurrentDepthForCausalLM.from_pretrained(old).save_pretrained(newer)
    for file in old.glob("*token*.json"):
        shutil.copy(file, newer)
    config = json.loads((newer / "config.json").read_text())
    assert config["format_version"] == FORMAT_VERSION
    (newer / "config.json").write_text(json.dumps({**config, "format_version": FORMAT_VERSION + 1, "exit": "new"}))


def same_machine(stranger: Path) -> bool:
    """True where the old files compute the golden bits: the machine sums in the order of the one that kept them."""
    made = ((stranger / f"{name}.stranger.safetensors", OLD / f"expected/{name}.safetensors") for name in CHECKPOINTS)
    return all(torch.equal(x, load_file(kept)[key]) for here, kept in made for key, x in load_file(here).items())


def compute_logits(model: Any, name: str) -> dict[str, torch.Tensor]:
    """Logits [B, T, V] of the golden ids, at every depth that the golden file has."""
    expected = load_file(OLD / f"expected/{name}.safetensors")
    keys = expected.keys() - {"ids"}
    with torch.no_grad():
        return {k: model(expected["ids"], num_recurrences=int(k.removeprefix("logits_"))).logits for k in sorted(keys)}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_computes_what_it_did(stranger, name):
    """By its own old files and by ours the same bits; the golden ones up to the order in which a machine sums."""
    theirs = load_file(stranger / f"{name}.stranger.safetensors")
    ours = compute_logits(RecurrentDepthForCausalLM.from_pretrained(stranger / name).eval(), name)
    golden = load_file(OLD / f"expected/{name}.safetensors")
    assert theirs.keys() == ours.keys()
    assert len(ours) >= 1
    for key, logits in ours.items():
        assert torch.equal(logits, theirs[key]), key
        torch.testing.assert_close(logits, golden[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_generates_the_same_tokens(old, name, capsys):
    for expected in json.loads((old / "expected/generated.json").read_text())[name]:
        arguments = ["--recipe", f"recipes/generate-{name}.yaml", f"prompt={expected['prompt']}"]
        assert main(["generate", name, *arguments]) == 0
        answer = json.loads(capsys.readouterr().out)
        kept = ("prompt", "tokens", "depths", "text", "finish_reason")
        assert {key: answer[key] for key in kept} == {key: expected[key] for key in kept}


@pytest.mark.parametrize("name", ["retrofit", "mor"])
def test_a_checkpoint_trains_on(old, name):
    settings = ["data.train=corpus.jsonl", "data.sequence_length=16", "batch_size=4", "steps=6", "log_every=1"]
    assert main(["train", name, "out", *settings, "optimiser.learning_rate=3e-3"]) == 0
    records = json.loads((old / "out/trainer_state.json").read_text())["log_history"]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    before, after = (load_file(old / folder / "model.safetensors") for folder in (name, "out"))
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[key], after[key]) for key in before)


def test_a_config_without_a_version_has_the_first(old):
    assert "format_version" not in json.loads((old / "mor/config.json").read_text())
    RecurrentDepthConfig.from_pretrained("mor").save_pretrained("again")
    assert json.loads((old / "again/config.json").read_text())["format_version"] == FORMAT_VERSION == 1


NEWER = "format_version=2: a newer loopwise wrote this config, and this one reads versions up to 1; upgrade loopwise"


@pytest.mark.parametrize(
    "command",
    [
        "convert newer out sizes=1,2,1",
        "train newer out data.train=corpus.jsonl steps=1",
        "eval newer data=corpus.jsonl",
        "generate newer prompt=the",
        "serve newer",
        "inspect newer",
        "export newer out --unroll 2",
    ],
)
def test_a_newer_format_is_refused_by_every_command(old, command, capsys):
    save_newer(old / "retrofit", old / "newer")
    capsys.readouterr()
    assert main(command.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert NEWER in lines[0]
    assert str(Path("newer/config.json")) in lines[0]


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None])
def test_a_version_that_is_none_is_refused_in_one_line(old, version, capsys):
    config = json.loads((old / "retrofit/config.json").read_text())
    (old / "retrofit/config.json").write_text(json.dumps({**config, "format_version": version}))
    assert main(["inspect", "retrofit"]) == 2
    line = f"retrofit/config.json: format_version={version!r}: an integer of 1 or more"
    assert capsys.readouterr().err.splitlines() == [f"loopwise: error: {line}"]


def test_a_newer_format_is_refused_by_the_files_that_travel(stranger):
    assert (stranger / "newer.txt").read_text() == NEWER + "\n"


def resume(*options: str) -> int:
    return main(["train", "recursive", "run", "--recipe", "recipes/train-run.yaml", "--resume", *options])


def move_run(folder: Path) -> None:
    """Let the run have been started in `folder`: it recorded the path of its model."""
    record = folder / "run/checkpoint-4/run.json"
    record.write_text(record.read_text().replace('"/golden/recursive"', json.dumps(str(folder / "recursive"))))


def test_a_stopped_run_ends_as_the_uninterrupted_one(old, stranger, capsys):
    move_run(old)
    assert resume() == 0
    assert "from checkpoint-4" in capsys.readouterr().out
    ours, golden = load_file(old / "run/model.safetensors"), load_file(old / "expected/run.safetensors")
    assert ours.keys() == golden.keys()
    exact = same_machine(stranger)
    for key, x in ours.items():  # Adam divides by the root of small squares, which enlarges a difference of rounding
        torch.testing.assert_close(x, golden[key], atol=0.0 if exact else 1e-3, rtol=0)


def test_a_stopped_run_that_was_changed_is_refused_by_name(old, capsys):
    assert resume() == 2
    error = capsys.readouterr().err
    assert f"MODEL was '/golden/recursive', now '{old / 'recursive'}'" in error
    assert len(error.splitlines()) == 1
    move_run(old)
    assert resume("optimiser.learning_rate=1e-3") == 2
    assert "optimiser.learning_rate was 0.003, now 0.001)" in capsys.readouterr().err


def recipe_kinds() -> dict[str, Any]:
    """The recipe class of every verb."""
    from loopwise.convert.recipe import ConvertRecipe
    from loopwise.evaluation.recipe import Evaluate
    from loopwise.serve.generate import GenerateRecipe
    from loopwise.serve.recipe import ServeRecipe
    from loopwise.train.recipe import Train

    verbs = ("convert", "train", "eval", "generate", "serve")
    return dict(zip(verbs, (ConvertRecipe, Train, Evaluate, GenerateRecipe, ServeRecipe), strict=True))


def flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Settings by dotted key."""
    made: dict[str, Any] = {}
    for key, value in values.items():
        inner = flat(value, f"{prefix}.{key}") if isinstance(value, dict) else {f"{prefix}.{key}": value}
        made |= inner or {f"{prefix}.{key}": {}}
    return made


def current_key(key: str) -> str:
    """A dotted key with today's names of its parts."""
    return ".".join(RECIPE_KEYS[part].new if part in RECIPE_KEYS else part for part in key.split("."))


def assert_same_settings(kind: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Every setting of then has its key, by today's name, and its value, but for defaults that changed on purpose."""
    new = flat(now, kind)
    old = {key if key in new else current_key(key): value for key, value in flat(then, kind).items()}
    changed = {key: (value, new.get(key, "absent")) for key, value in old.items() if new.get(key, "absent") != value}
    assert {key: pair for key, pair in changed.items() if DEFAULTS.get(key) != pair} == {}


OLD_SETTINGS = json.loads((OLD / "expected/settings.json").read_text())


@pytest.mark.parametrize("name", [name for name in OLD_SETTINGS if name.endswith(".yaml")])
def test_a_recipe_means_the_same(old, name):
    kind = name.partition("-")[0]
    recipe = load_recipe(recipe_kinds()[kind], kind, f"recipes/{name}", [])
    assert_same_settings(kind, OLD_SETTINGS[name], recipe.model_dump(mode="json"))


@pytest.mark.parametrize(("kind", "settings"), json.loads((OLD / "command-lines.json").read_text()).items())
def test_a_command_line_means_the_same(kind, settings):
    recipe = load_recipe(recipe_kinds()[kind], kind, None, settings)
    assert_same_settings(kind, OLD_SETTINGS[kind], recipe.model_dump(mode="json"))


@pytest.mark.parametrize("name", ["retrofit", "recursive"])
def test_a_convert_recipe_makes_the_same_model(old, name):
    assert main(["convert", "source", "out", "--recipe", f"recipes/convert-{name}.yaml"]) == 0
    ours, golden = (load_file(old / folder / "model.safetensors") for folder in ("out", name))
    assert ours.keys() == golden.keys()
    for key, x in ours.items():  # a singular value decomposition rounds otherwise on another machine
        torch.testing.assert_close(x, golden[key], atol=1e-5, rtol=0)
    then, now = (json.loads((old / folder / "config.json").read_text()) for folder in (name, "out"))
    del then["source_config"], now["source_config"], then["transformers_version"]
    assert {key: now.get(key) for key in then} == then


REQUESTS = json.loads((OLD / "requests.json").read_text())
MEANINGS = json.loads((OLD / "expected/meanings.json").read_text())


def parse_request(body: dict[str, Any]) -> dict[str, Any]:
    """The depth fields of a request's body, as the server reads them. Raises FieldError."""
    from loopwise.serve.api.fields import take_fields
    from loopwise.serve.api.limits import Limits
    from loopwise.serve.api.validation import validate_fields

    rules = ("fixed", "latent-diff", "cosine", "entropy-diff", "kl", "minp-kl", "argmax-stability")
    limits = Limits(num_recurrences=3, max_recurrences=8, rules=rules, prompt_exit=True)
    return validate_fields(take_fields(body, ("model", "prompt", "max_tokens", "temperature", "vllm_xargs")), limits)


def request_names(refused: bool) -> list[str]:
    return [name for name in REQUESTS if ("refused" in MEANINGS[name]) == refused]


@pytest.mark.parametrize("name", request_names(refused=False))
def test_a_request_body_means_the_same(name):
    from loopwise.serve.api.fields import OLD_FIELDS

    meaning = {OLD_FIELDS.get(field, field): value for field, value in MEANINGS[name]["values"].items()}
    assert parse_request(deepcopy(REQUESTS[name])) == meaning


@pytest.mark.parametrize("name", request_names(refused=True))
def test_a_request_body_is_refused_for_the_same_field(name):
    from loopwise.serve.api.fields import FieldError

    with pytest.raises(FieldError) as error:
        parse_request(deepcopy(REQUESTS[name]))
    assert error.value.field == MEANINGS[name]["refused"]


def test_every_request_field_of_then_is_asked_for():
    fields = {
        "num_recurrences", "min_recurrences", "exit_rule", "exit_threshold", "prompt_exit", "trace",
        "return_recurrences", "decoder", "wave", "diffusion",
    }  # fmt: skip
    assert {name for meaning in MEANINGS.values() for name in meaning.get("values", {})} == fields


def test_the_offline_engine_gives_the_same_answers(old):
    """By keywords of the engine and of its parameters that are named as then."""
    from loopwise.serve import DiffusionSettings, Engine, Params

    engine = Engine("retrofit", rows=2, length=48, wave=8)  # pyright: ignore[reportCallIssue]
    for name, meaning in MEANINGS.items():
        if "refused" in meaning:
            continue
        values = {key: value for key, value in meaning["values"].items() if key != "return_recurrences"}
        if "prompt_exit" in values:
            values["prompt_exit"] = bool(values["prompt_exit"])
        if "diffusion" in values:
            values["diffusion"] = replace(DiffusionSettings(), **json.loads(values["diffusion"]))
        if "trace" in values:
            values["trace"] = tuple(values["trace"])
        (done,) = engine.generate([REQUESTS[name]["prompt"]], Params(max_tokens=REQUESTS[name]["max_tokens"], **values))
        assert (done.tokens, done.depths) == (meaning["tokens"], meaning["depths"]), name


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_a_server_gives_the_same_answers(old):
    """vLLM's server, in float32. Tokens of a diffusion depend on which steps the server runs together."""
    from tests.helpers.serving import serving

    vocabulary = json.loads((old / "retrofit/tokenizer.json").read_text())["model"]["vocab"]
    characters = {number: text for text, number in vocabulary.items() if number}  # 0 ends a text
    with serving(old / "retrofit", "name=tiny", "wave=8", "--", "--max-model-len", "48") as server:
        for name in request_names(refused=True):
            status, answer = post(server.url + "/v1/completions", REQUESTS[name])
            assert status == 400, name
            assert MEANINGS[name]["refused"] in answer["error"]["message"]
        for name in request_names(refused=False):
            status, answer = post(server.url + "/v1/completions", REQUESTS[name])
            assert status == 200, answer
            text = "".join(characters.get(token, "") for token in MEANINGS[name]["tokens"])
            if "diffusion" not in REQUESTS[name]:
                assert answer["choices"][0]["text"] == text, name


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
