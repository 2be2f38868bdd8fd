"""`--print-config` prints settings that can be fed back, `--print-schema` the schema by which editors check files."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from loopwise.cli import VERBS, main
from loopwise.errors import UserError
from loopwise.recipe import RECIPES, Loader, validate
from loopwise.recipe_schema import recipe_schema
from tests.helpers.recipes import MODELS, NEEDED, load
from tests.helpers.repository import ROOT

SHIPPED = [(verb, path) for verb in MODELS for path in sorted((RECIPES / verb).glob("*.yaml"))]
OLD = [
    (verb, path) for verb in MODELS for path in sorted((ROOT / "tests/golden/fe1419e/recipes").glob(f"{verb}-*.yaml"))
]
# Settings that a user adds to a recipe of `loopwise train`.
BESIDE = ["data.train=text.txt", "steps=7"]
OWN = {"hops": [], "hops-base": [], "hops-code": [], "distill": [*BESIDE, "objectives.distillation.teacher=SOURCE"]}
NAMES = [f"{verb}-{path.stem}" for verb, path in SHIPPED + OLD]


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The output of a command that ends with exit code 0."""
    with pytest.raises(SystemExit) as caught:
        main([*argv])
    assert caught.value.code == 0
    return capsys.readouterr().out


def checker(verb: str) -> Draft202012Validator:
    schema = recipe_schema(verb, MODELS[verb])
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def as_editor(text: str) -> Any:
    """A recipe file as an editor reads it: keys of mappings are text."""
    return json.loads(json.dumps(yaml.load(text, Loader)))


@pytest.mark.parametrize(("verb", "path"), SHIPPED, ids=NAMES[: len(SHIPPED)])
def test_a_shipped_recipe_that_is_printed_and_fed_back_is_the_same(verb, path, capsys, tmp_path):
    beside = OWN.get(path.stem, BESIDE) if verb == "train" else []
    text = printed(capsys, verb, "--recipe", path.stem, *beside, "--print-config")
    file = tmp_path / "printed.yaml"
    file.write_text(text)
    recipe = load(verb, *beside, recipe=path.stem)
    assert load(verb, recipe=str(file)).model_dump() == recipe.model_dump()
    assert printed(capsys, verb, "--recipe", str(file), "--print-config") == text
    assert yaml.safe_load(text).keys() == MODELS[verb].model_fields.keys(), "defaults are printed, too"
    assert [*checker(verb).iter_errors(as_editor(text))] == []


SETTINGS = {
    "train": ["data.train=a.txt,b c.txt", "recurrence.schedule=steps", "recurrence.levels={0: 2, 0.5: 4}",
              "optimiser.betas=0.8,0.9", "optimiser.learning_rate=1e-5", "optimiser.multipliers={embeddings: 0.1}",
              "data.text_field=0123", "data.packing_strategy=bfd", "data.long_documents=skip",
              "data.eval=task:hops", "data.group=hops",
              "adapters.rank=4", "epochs=2", "gradient_checkpointing=true",
              "data.recurrences.field=hops", "data.recurrences.table={1: 2, hard: 8}"],
    "eval": ["data=task:hops?hops=1..4", "group=hops", "endpoint=http://localhost:1/v1", "request.exit_rule=cosine"],
    "calibrate": ["data=a.jsonl,b.jsonl", "rule=kl", "budget=1e-3", "prompt_exit=true"],
    "search": ["data=a.txt", "check=b.txt,c.txt", "sizes=2,4", "ways=skip,half-steps", "stride=2"],
    "convert": ["sizes=2,4,2", "lora.rank={q: 8, down: 32}", "exit.rule=kl", "exit.threshold=1e-3", "revision=010",
                "recurrence_damping=1/R", "recurrence_norm=between"],
    "generate": ["prompt=yes: 'no'\n", "temperature=0.5", "top_k=-1", "decoder=wave"],
    "serve": ["budget=auto", "coda_wait=-1", "name=null", "max_lanes=4", "ticks=8", "max_body_mib=16", "body_seconds=5",
              "max_choices=4", "max_queue=0", "open_metrics=true", "hang_seconds=0"],
    "init": ["hidden_size=64", "seed=7"],
}  # fmt: skip


@pytest.mark.parametrize("verb", MODELS)
def test_settings_that_are_printed_and_fed_back_are_the_same(verb, capsys, tmp_path):
    """Every verb with a recipe, with operands or without them."""
    text = printed(capsys, verb, *SETTINGS[verb], "--print-config")
    assert text == printed(capsys, verb, "--print-config", "MODEL", *SETTINGS[verb])
    file = tmp_path / "printed.yaml"
    file.write_text(text)
    assert load(verb, recipe=str(file)).model_dump() == load(verb, *SETTINGS[verb]).model_dump()
    assert load(verb, *NEEDED[verb]).model_dump() != load(verb, *SETTINGS[verb]).model_dump()
    assert [*checker(verb).iter_errors(as_editor(text))] == []


def test_every_verb_with_a_recipe_is_tested(capsys):
    with_recipe = {verb for verb in VERBS if "--recipe" in printed(capsys, verb, "--help")}
    assert with_recipe == {*MODELS}


def test_wrong_settings_are_not_printed(capsys):
    assert main(["train", "data.train=a.txt", "optimiser.knd=muon", "--print-config"]) == 2
    assert main(["convert", "a", "b", "c", "--print-config"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("verb", MODELS)
def test_the_printed_schema_is_the_recipe_s(verb, capsys):
    schema = json.loads(printed(capsys, verb, "--print-schema"))
    assert schema == recipe_schema(verb, MODELS[verb])
    assert {*MODELS[verb].model_fields} <= schema["properties"].keys()
    described = [name for name, inner in schema["properties"].items() if "description" not in json.dumps(inner)]
    assert [name for name in described if "$ref" not in json.dumps(schema["properties"][name])] == []


def places(value: Any) -> Iterator[dict[str, Any]]:
    """`value` and the sections in it, and no mapping whose keys are free: {share: number}, {source: weight}."""
    if isinstance(value, dict):
        yield value
        for key, inner in value.items():
            if key not in ("levels", "backprop_levels", "sources", "table"):
                yield from places(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from places(inner)


@pytest.mark.parametrize(("verb", "path"), SHIPPED + OLD, ids=NAMES)
def test_schemas_take_every_recipe_and_refuse_every_typo(verb, path):
    """Every key of every recipe is refused with a letter less, and with a mapping as its value."""
    check = checker(verb)
    values = as_editor(path.read_text())
    assert [*check.iter_errors(values)] == []
    for place in range(len([*places(values)])):
        for key in [*places(values)][place]:
            wrong = copy.deepcopy(values)
            holder = [*places(wrong)][place]
            holder[key[:-1]] = holder.pop(key)
            assert [*check.iter_errors(wrong)], f"{key[:-1]} passes"
            holder[key] = {"no": {"such": "value"}}
            del holder[key[:-1]]
            assert [*check.iter_errors(wrong)], f"{key} may be anything"


# Lines of recipes, and if loader and schema take them, beside what else the recipe needs.
TAKEN = {
    "train": """
        data.train: a.txt,b.txt
        data.train: [a.txt]
        data: {train: [], phases: [{share: 1, sources: {a.txt: 1}, recurrence: {mean: 3, backprop: 2}}]}
        data.recurrences: {field: hops, table: {1: 2, 2: 4}}
        data.streaming: true
        data.streaming: a.txt
        recurrence: null
        recurrence.eval_at: 4
        recurrence.eval_at: '1,4'
        recurrence.levels: {0: 2, 0.5: 4}
        objectives.deep_supervision.segments: 4
        objectives.progressive: {alpha: 0.3}
        optimiser.betas: 0.8,0.9
        optimiser.learning_rate: 1e-4
        optimiser.learning_rate: 1.0e-4
        optimiser.train: core,norms
        optimizer.clip: 0
        gradient_checkpointing: true
    """,
    "convert": """
        kv_policy: modulo-4
        lora.rank: 8
        lora.rank: {q: 8}
        lora: {rank: 2, targets: "q,down"}
        recurrence_damping: 1
        recurrence_damping: 5e-1
        recurrence_damping: 1/R
        router.capacity: 1,0.5
        router.update: step
    """,
    "serve": """
        budget: auto
        budget: -1
        budget: 0
        coda_wait: 3
        ticks: 4
        name: null
    """,
}
REFUSED = {
    "train": """
        batch_size: null
        data.phases: a.txt
        data: {train: [], phases: [{share: 1, sources: {a.txt: 1}, recurrence: {mean: 3, levels: {0: 1}}}]}
        data.recurrences: {field: hops, table: {1: 64}}
        data.recurrences: {field: hops, table: {}}
        optimiser.betas: [0.9]
        optimiser.kind: sgd
        optimiser.learning_rate: fast
        optimiser.learning_rate: 0
        optimiser.multipliers: {cores: 1}
        optimiser.train: core,gates
        optimiser.warmup: 2
        recurrence.eval_at: [0]
        recurrence.levels: 4
        rows: 3
        steps: 1.5
        steps: true
    """,
    "convert": """
        loops: 5000
        lora.rank: 0
        lora.rank: {qq: 8}
        lora.targets: q,left
        recurrence_damping: 0
        recurrence_damping: 1.5
        recurrence_damping: 2/R
        router.capacity: [2]
        router.update: mix
    """,
    "serve": """
        budget: some
        budget: -2
        body_seconds: 0
        engine: fast
        hang_seconds: -1
        max_body_mib: 0
        max_choices: 0
        max_queue: -1
        passes_per_step: 0
        port: 70000
    """,
}


def lines(table: dict[str, str]) -> list[tuple[str, str]]:
    return [(verb, line.strip()) for verb, text in table.items() for line in text.strip().splitlines()]


def nested(line: str) -> dict[str, Any]:
    """`{"a": {"b": value}}` of `a.b: value`."""
    key, _, value = line.partition(": ")
    found = yaml.safe_load(value)
    for part in reversed(key.split(".")):
        found = {part: found}
    return found


def loaded(verb: str, line: str) -> Any:
    """The recipe with this line and what it needs."""
    needed = {"train": {"steps": 1, "data": {"train": ["a.txt"]}}, "convert": {"method": "mor", "loops": 2}}
    merged: dict[str, Any] = needed.get(verb, {})
    for key, value in nested(line).items():
        merged[key] = {**merged[key], **value} if isinstance(merged.get(key), dict) else value
    return validate(MODELS[verb], merged)


@pytest.mark.parametrize(("verb", "line"), lines(TAKEN))
def test_what_the_loader_takes_passes_the_schema(verb, line):
    assert [*checker(verb).iter_errors(json.loads(json.dumps(nested(line))))] == []
    assert loaded(verb, line)


@pytest.mark.parametrize(("verb", "line"), lines(REFUSED))
def test_what_the_loader_refuses_does_not_pass_the_schema(verb, line):
    assert [*checker(verb).iter_errors(json.loads(json.dumps(nested(line))))]
    with pytest.raises(UserError):
        loaded(verb, line)
