"""Checkpoints and recipes, changed at random: read as before, or refused in one line with nothing written."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from safetensors import safe_open

from loopwise.cli import main
from tests.helpers.gguf_files import family_model, write_gguf
from tests.helpers.serve_tiny import tokenizer
from tests.helpers.train_tiny import llama_config, save_recurrent

FILES = ("config.json", "config.json", "config.json", "tokenizer.json", "tokenizer_config.json",
         "generation_config.json", "model.safetensors", "chat_template.jinja", "loopwise.json",
         "model.safetensors.index.json", "special_tokens_map.json")  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 10**18, -(10**30), 0.5, float("nan"), float("inf"), "", "x", "0", "../x",
    "é\u0000\ud83d", "/dev/zero", "a" * 10_000, [], [[]], {}, {"a": {}}, [None], [-1], [10**9], [1] * 5000,
    {"model_type": "llama"}, "DEEP", "DIGITS",
]  # fmt: skip
LITERALS = {'"DEEP"': "[" * 3000 + "]" * 3000, '"DIGITS"': "9" * 5000}
SCALARS = (
    "2020-99-99", "!!int abc", "0b_", "&a [*a]", "!!python/object/apply:os.getcwd []", "1e999", "~", "? ", "[", "{",
    "'", "\t", "!x", "<<: 1", "[" * 3000, "9" * 5000, "é", "0x", "1:99", "- -", "|", "%YAML 9", "*b", "@", "`",
    "{a: 1, a: 2}", "true", "-", "-1", "0", "[]", "{}", "null", ".inf", ".nan", "!!set {a}", "!!binary x",
)  # fmt: skip
DATA = {"train": "T", "sequence_length": 32}
RECIPE: dict[str, dict[str, Any]] = {
    "train": {"data": DATA, "batch_size": 2, "steps": 1, "optimiser": {"learning_rate": 1}},
    "convert": {"sizes": [1, 2, 1], "num_recurrences": 2, "injection": "linear", "dtype": "float32"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> SimpleNamespace:
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("mutations")
    text = folder / "text.txt"
    text.write_text("the core runs again while depth grows with every pass over one state " * 40)
    small = {"eos_token_id": 257, "hidden_size": 16, "intermediate_size": 16}
    AutoModelForCausalLM.from_config(llama_config(**small)).save_pretrained(folder / "plain")
    save_recurrent(folder / "recurrent", tokenizer(), small)
    tokenizer().save_pretrained(folder / "plain")
    for model in ("plain", "recurrent"):
        (folder / model / "loopwise.json").write_text(json.dumps(RECORD_OF_A_RUN))
    shutil.copytree(folder / "plain", folder / "indexed")
    (folder / "indexed" / "model.safetensors").rename(folder / "indexed" / "part.safetensors")
    with safe_open(folder / "indexed" / "part.safetensors", framework="numpy") as tensors:
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors.keys(), "part.safetensors")}
    (folder / "indexed" / "model.safetensors.index.json").write_text(json.dumps(index))
    lines = [json.dumps({"text": f"the core runs again {number} " * 20}) + "\n" for number in range(30)]
    (folder / "data.jsonl").write_text("".join(lines))
    Dataset.from_list([json.loads(line) for line in lines]).to_parquet(folder / "data.parquet")
    write_gguf(folder / "model.gguf", family_model("llama", **small), "llama")
    files = [folder / name for name in ("data.jsonl", "data.parquet", "model.gguf")]
    return SimpleNamespace(
        **{name: folder / name for name in ("plain", "recurrent", "indexed")}, text=text, files=files
    )


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values inside of `value`, of long lists and mappings some."""
    found = [path] if path else []
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items[:40]:
        found += places(inner, (*path, key))
    return found


def changed_json(text: str, draw: random.Random) -> str:
    """The JSON `text` with one value replaced, added or left out."""
    value = json.loads(text)
    *above, last = draw.choice(places(value))
    holder = value
    for key in above:
        holder = holder[key]
    way = draw.randrange(6)
    if way == 0:
        del holder[last]
    elif way == 1 and isinstance(holder, dict):
        holder["".join(draw.choices("abcxyz_", k=8))] = draw.choice(VALUES)
    else:
        holder[last] = draw.choice(VALUES)
    made = json.dumps(value)
    for short, long in LITERALS.items():
        made = made.replace(short, long)
    return made


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """`content` with some bytes changed, cut, or put in."""
    at = draw.randrange(min(len(content), 2000) or 1)
    more = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
    return [content[:at], content[:at] + more + content[at + len(more) :], content[:at] + more + content[at:]][
        draw.randrange(3)
    ]


def mutate(folder: Path, draw: random.Random) -> str:
    """Change one file of the checkpoint `folder`. Returns its name."""
    name = draw.choice(FILES)
    if name == "model.safetensors" and not (folder / name).exists():
        name = "part.safetensors"
    file = folder / name
    if not file.exists():
        file.write_text("{}")
    way = draw.randrange(10)
    if way == 0:
        file.unlink()
        if draw.randrange(2):
            file.mkdir()
        return name
    content = file.read_bytes()
    if way < 7 and file.suffix == ".json" and json.loads(content):
        file.write_text(changed_json(content.decode(), draw), encoding="utf-8")
    else:
        file.write_bytes(changed_bytes(content, draw))
    return name


def mutated_recipe(kind: str, file: Path, draw: random.Random) -> None:
    """Write a recipe with one scalar replaced."""
    from yaml import safe_dump

    lines = safe_dump(RECIPE[kind]).splitlines()
    at = draw.randrange(len(lines))
    key, colon, _ = lines[at].rpartition(":")
    scalar = draw.choice(SCALARS)
    lines[at] = f"{key}{colon} {scalar}" if draw.randrange(4) else f"{scalar}: {lines[at].strip()}"
    text = "\n".join(lines).encode()
    file.write_bytes(changed_bytes(text, draw) if draw.randrange(4) == 0 else text)


COMMANDS: dict[str, Callable[[SimpleNamespace, Path], list[str]]] = {
    "inspect": lambda models, out: ["inspect", "M"],
    "convert": lambda models, out: ["convert", "M", str(out), "sizes=1,2,1", "--dry-run"],
    "train": lambda models, out: [
        *("train", "M", str(out), f"data.train={models.text}", "data.sequence_length=32", "steps=1", "--dry-run"),
    ],
    "eval": lambda models, out: ["eval", "M", f"data={models.text}", "sequence_length=32", "limit=1"],
    "generate": lambda models, out: ["generate", "M", "prompt=again", "max_tokens=1"],
    "export": lambda models, out: ["export", "M", str(out), "--unroll", "2"],
    "search": lambda models, out: [
        *("search", "M", f"data={models.text}", "sequence_length=32", "limit=1", "sizes=1", "stride=3", "ways=skip"),
    ],
    "calibrate": lambda models, out: [
        *("calibrate", "M", str(out), f"data={models.text}", "rule=latent-diff", "sequence_length=32", "limit=2"),
        "budget=9",
    ],
}
RECORD_OF_A_RUN = {
    "loopwise": "0.1.0",
    "source": {"id": "them/base", "revision": None, "sha256": {"model.safetensors": "0"}},
    "files": ["config.json", "loopwise.json", "model.safetensors"],
    "weights": {"model.safetensors": [1, 2]},
    "code": {"modeling_recurrent_depth.py": "0"},
    **{"steps": 3, "tokens": 96, "flops": 1e9, "held_out_loss": {"eval_loss_r1": 2.5}},
}
OF_PLAIN = ("convert", "search")  # verbs that read a plain model
SECONDS = 5  # of a refusal


def check(arguments: list[str], out: Path, seed: int, what: str, capsys) -> int:
    """Run the command; where it refuses a --dry-run, once more in earnest. Returns its exit code."""
    capsys.readouterr()
    start = time.monotonic()
    try:
        status = main(arguments)
    except BaseException as error:
        raise AssertionError(f"seed {seed}, {what}: {type(error).__name__}: {str(error)[:300]}") from error
    took = time.monotonic() - start
    errors = capsys.readouterr().err
    assert status in (0, 2), (seed, what, status)
    assert took < (SECONDS if status == 2 else 60), (seed, what, took)  # no value makes a command hang
    if status == 2:
        lines = [line for line in errors.splitlines() if line.startswith("loopwise: error: ")]
        assert len(lines) == 1, (seed, what, errors[-500:])
        assert errors.endswith(f"{lines[0]}\n"), (seed, what, errors[-500:])
        assert len(lines[0]) < 2000, (seed, what)
        assert not out.exists(), (seed, what)
        if "--dry-run" in arguments:
            earnest = [word for word in arguments if word != "--dry-run"]
            assert check(earnest, out, seed, f"in earnest, {what}", capsys) == 2
    return status


def check_checkpoint(seed: int, models: SimpleNamespace, folder: Path, capsys, verbs: tuple[str, ...] = ()) -> int:
    draw, copy, out = random.Random(seed), folder / "model", folder / "out"
    verb = draw.choice(verbs or [*COMMANDS])
    shutil.rmtree(copy, ignore_errors=True)
    plain = models.indexed if draw.randrange(3) == 0 else models.plain
    shutil.copytree(plain if verb in OF_PLAIN else models.recurrent, copy)
    name = mutate(copy, draw)
    given = [str(copy) if word == "M" else word for word in COMMANDS[verb](models, out)]
    before = sorted(path.name for path in folder.iterdir())
    status = check(given, out, seed, f"{verb} with another {name}", capsys)
    if status == 0:
        shutil.rmtree(out, ignore_errors=True)
    assert sorted(path.name for path in folder.iterdir()) == before, seed
    return status


def check_recipe(seed: int, models: SimpleNamespace, folder: Path, capsys) -> int:
    draw = random.Random(seed)
    kind = draw.choice([*RECIPE])
    file, out = folder / "recipe.yaml", folder / "out"
    mutated_recipe(kind, file, draw)
    file.write_bytes(file.read_bytes().replace(b"train: T", f"train: {models.text}".encode()))
    model = models.plain if kind == "convert" else models.recurrent
    text = file.read_text(encoding="utf-8", errors="replace")
    given = [kind, str(model), str(out), "--recipe", str(file), "--dry-run"]
    return check(given, out, seed, text[:300], capsys)


def check_file(seed: int, models: SimpleNamespace, folder: Path, capsys) -> int:
    """As `check_checkpoint`, of text in records or in a table, and of a GGUF file."""
    draw, out = random.Random(seed), folder / "out"
    source = draw.choice(models.files)
    file = folder / source.name
    file.write_bytes(changed_bytes(source.read_bytes(), draw))
    given = ["train", str(models.recurrent), str(out), f"data.train={file}", "data.sequence_length=32", "steps=1"]
    if source.suffix == ".gguf":
        given = ["convert", str(file), str(out), "sizes=1,2,1"]
    status = check([*given, "--dry-run"], out, seed, source.name, capsys)
    file.unlink()
    assert not [path for path in folder.iterdir() if path.name.startswith((".out", "out"))], seed
    return status


PLAIN, EVERY = ("convert", "train", "eval"), ("inspect", "train", "eval", "generate")
LARGE = [
    ("plain", {"num_hidden_layers": 1_000_000}, "num_hidden_layers=1000000; a model has at most 1024 layers", PLAIN),
    ("plain", {"num_hidden_layers": 1000}, "config.json has 1000 layers, and the weights have 4", PLAIN),
    ("plain", {"layer_types": ["full_attention"] * 2000}, "layer_types has 2000 entries; a model has at most", PLAIN),
    ("plain", {"intermediate_size": 10**8}, " parameters, and the weights have ", ("train", "eval", "search")),
    ("plain", {"vocab_size": 10**8}, " parameters, and the weights have ", ("train", "eval", "search")),
    ("recurrent", {"source_config": {"vocab_size": 10**8}}, " parameters, and the weights have ", ("train", "eval")),
    ("recurrent", {"core": [1] * 1_000_000}, "core has 1000000 entries; a model has at most 1024 layers", EVERY),
    ("recurrent", {"source_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers=1000000000; a model has", EVERY),
]


@pytest.mark.parametrize(
    ("verb", "kind", "fields", "said"), [(verb, *case) for *case, verbs in LARGE for verb in verbs]
)
def test_numbers_of_layers_have_a_limit(verb, kind, fields, said, models, tmp_path, capsys):
    model = shutil.copytree(getattr(models, kind), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    inner = {"source_config": config["source_config"] | fields["source_config"]} if "source_config" in fields else {}
    (model / "config.json").write_text(json.dumps(config | fields | inner))
    given = [str(model) if word == "M" else word for word in COMMANDS[verb](models, tmp_path / "out")]
    start = time.monotonic()
    assert main([word for word in given if word != "--dry-run"]) == 2
    assert time.monotonic() - start < 5
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_hundred_mutations(models, tmp_path, capsys):
    quick = ("inspect", "convert", "train")
    found = [check_checkpoint(seed, models, tmp_path, capsys, quick) for seed in range(50)]
    found += [check_recipe(seed, models, tmp_path, capsys) for seed in range(50)]
    found += [check_file(seed, models, tmp_path, capsys) for seed in range(12)]
    assert found.count(2) > 40  # most are refused


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 6000, 500))
def test_ten_thousand_mutations(first, models, tmp_path, capsys):
    refused = 0
    for seed in range(first, first + 500):
        refused += check_checkpoint(seed, models, tmp_path, capsys) == 2
        refused += seed % 5 == 0 and check_file(seed, models, tmp_path, capsys) == 2
        refused += check_recipe(seed, models, tmp_path, capsys) == 2
    assert refused > 300
