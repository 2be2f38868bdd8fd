"""Old names of serving, in every place that takes today's: one warning line in a process, and never both names."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from loopwise import deprecated
from loopwise.cli import main
from loopwise.deprecated import SERVING
from loopwise.evaluation.recipe import Evaluate
from loopwise.recipe import Section, load_recipe
from loopwise.serve import DiffusionSettings, Engine, Params
from loopwise.serve.api.decoders import decoder_of
from loopwise.serve.api.fields import FieldError, take_fields
from loopwise.serve.api.lanes import AUTO, LANES, LaneConfig
from loopwise.serve.api.limits import Limits
from loopwise.serve.api.validation import validate_params
from loopwise.serve.generate import GenerateRecipe
from loopwise.serve.recipe import ServeRecipe

# Today's name of each old one, written out, so that a change of the table shows.
NAMES = {
    "rows": "max_num_seqs",
    "length": "max_model_len",
    "prompt_lanes": "max_num_batched_tokens",
    "ticks": "passes_per_step",
    "width": "max_lanes",
    "wave": "max_in_flight",
}
EVAL = {"data": "task:hops", "endpoint": "http://127.0.0.1:1/v1"}


@pytest.fixture(autouse=True)
def _nothing_warned(monkeypatch):
    monkeypatch.setattr(deprecated, "_warned", set())


@pytest.fixture(scope="module")
def tiny(model):
    """The directory of a tiny model."""
    return model[0]


@dataclass
class Door:
    """A place that takes names. take: the values by today's names that it makes of values by any. kind: in messages."""

    names: tuple[str, ...]
    kind: str
    take: Callable[..., dict[str, Any]]
    error: type[Exception] = ValueError


def from_file(model: type[Section], verb: str, tmp_path, values: dict[str, Any]) -> Section:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return load_recipe(model, verb, str(tmp_path / "recipe.yaml"), [])


def from_settings(model: type[Section], verb: str, values: dict[str, Any]) -> Any:
    return load_recipe(model, verb, None, [f"{name}={value}" for name, value in values.items()])


def engine_sizes(tiny, values: dict[str, Any]) -> dict[str, Any]:
    engine = Engine(tiny, dtype="float32", **values)
    sizes = asdict(engine.loop.config)
    return sizes | {name: getattr(engine, name) for name in NAMES.values() if hasattr(engine, name)}


def from_lane_config(tiny, tmp_path, values: dict[str, Any]) -> dict[str, Any]:
    return asdict(LaneConfig.of(SimpleNamespace(additional_config={LANES: values})))


DOORS = {
    "Engine": Door(tuple(NAMES), "keyword", lambda tiny, tmp_path, v: engine_sizes(tiny, v)),
    "Params": Door(("wave",), "keyword", lambda tiny, tmp_path, v: asdict(Params(**v))),
    "DiffusionSettings": Door(("wave",), "keyword", lambda tiny, tmp_path, v: asdict(DiffusionSettings(**v))),
    "LaneConfig": Door(("ticks", "width", "wave"), "keyword", lambda tiny, tmp_path, v: asdict(LaneConfig(**v))),
    "additional_config": Door(("ticks", "width", "wave"), "keyword", from_lane_config),
    "generate recipe": Door(
        ("rows", "length", "wave"), "recipe key",
        lambda tiny, tmp_path, v: dict(from_file(GenerateRecipe, "generate", tmp_path, {"decoder": "wave", **v})),
    ),
    "serve recipe": Door(
        ("ticks", "width", "wave"), "recipe key",
        lambda tiny, tmp_path, v: dict(from_file(ServeRecipe, "serve", tmp_path, v)),
    ),
    "generate command line": Door(
        ("rows", "length", "wave"), "recipe key",
        lambda tiny, tmp_path, v: dict(from_settings(GenerateRecipe, "generate", {"decoder": "wave", **v})),
    ),
    "serve command line": Door(
        ("ticks", "width", "wave"), "recipe key",
        lambda tiny, tmp_path, v: dict(from_settings(ServeRecipe, "serve", v)),
    ),
    "eval's request": Door(
        ("wave",), "request field",
        lambda tiny, tmp_path, v: Evaluate.model_validate({**EVAL, "request": v}).request,
    ),
    "eval's command line": Door(
        ("wave",), "request field",
        lambda tiny, tmp_path, v: from_settings(
            Evaluate, "eval", EVAL | {f"request.{name}": value for name, value in v.items()}
        ).request,
    ),
    "body": Door(("wave",), "request field", lambda tiny, tmp_path, v: take_fields({"prompt": "a", **v}), FieldError),
    "vllm_xargs": Door(
        ("wave",), "request field", lambda tiny, tmp_path, v: take_fields({"vllm_xargs": v}), FieldError
    ),
}  # fmt: skip
CASES = [(door, old) for door, of in DOORS.items() for old in of.names]


def test_the_table():
    assert {old: entry.new for old, entry in SERVING.items()} == NAMES
    assert {entry.since for entry in SERVING.values()} == {"0.2.0"}


def test_every_door_shows_todays_names_alone():
    shown = {
        "Engine": set(inspect.signature(Engine).parameters),
        "Params": set(Params.__dataclass_fields__),
        "LaneConfig": set(LaneConfig.__dataclass_fields__),
        "generate recipe": set(GenerateRecipe.model_fields),
        "serve recipe": set(ServeRecipe.model_fields),
    }
    for door, names in shown.items():
        assert not names & NAMES.keys(), door
        assert names & set(NAMES.values()) == {NAMES[old] for old in DOORS[door].names}, door


@pytest.mark.parametrize(("door", "old"), CASES)
def test_an_old_name_means_todays_and_warns_once(door, old, tiny, tmp_path, capsys):
    place, new = DOORS[door], NAMES[old]
    for _ in range(2):
        assert place.take(tiny, tmp_path, {old: 21})[new] == 21
    lines = [line for line in capsys.readouterr().err.splitlines() if "deprecated" in line]
    assert lines == [f"loopwise: warning: {place.kind} {old!r} is deprecated since loopwise 0.2.0: use {new!r}"]
    assert place.take(tiny, tmp_path, {new: 22})[new] == 22
    assert "deprecated" not in capsys.readouterr().err


@pytest.mark.parametrize(("door", "old"), CASES)
def test_both_names_are_refused_by_one_line(door, old, tiny, tmp_path, capsys):
    place, new = DOORS[door], NAMES[old]
    for values in ({old: 21, new: 21}, {new: 21, old: 21}):
        with pytest.raises(place.error) as caught:
            place.take(tiny, tmp_path, values)
        message = str(caught.value)
        assert old in message
        assert new in message
        assert "two names of one" in message
    assert capsys.readouterr().err == ""


def test_both_names_in_the_two_places_of_a_body_are_refused(capsys):
    for body in ({"wave": 4, "vllm_xargs": {"max_in_flight": 4}}, {"max_in_flight": 4, "vllm_xargs": {"wave": 4}}):
        with pytest.raises(FieldError, match="'wave' and 'max_in_flight' are two names of one value") as caught:
            take_fields(body)
        assert caught.value.field == "max_in_flight"
    assert capsys.readouterr().err == ""
    assert take_fields({"wave": 4, "vllm_xargs": {"wave": 4, "max_in_flight": None}}) == {"max_in_flight": 4}


def test_extra_arguments_of_vllm_take_the_old_field(capsys):
    limits = Limits(4, 8, ("fixed",), prompt_exit=True)
    for name in ("wave", "max_in_flight"):
        params = SimpleNamespace(extra_args={"decoder": "wave", name: 3})
        validate_params(params, limits)
        assert decoder_of(params, "plain", 8).max_in_flight == 3
        with pytest.raises(FieldError, match="max_in_flight=9: an integer from 1 to 8, the server's max_in_flight"):
            validate_params(SimpleNamespace(extra_args={"decoder": "wave", name: 9}), limits)
    assert capsys.readouterr().err.count("request field 'wave' is deprecated") == 1
    with pytest.raises(FieldError, match="'wave' and 'max_in_flight' are two names of one value"):
        validate_params(SimpleNamespace(extra_args={"decoder": "wave", "wave": 3, "max_in_flight": 3}), limits)
    validate_params(SimpleNamespace(extra_args={"decoder": "wave", "wave": 3, "max_in_flight": None}), limits)


def test_the_old_field_is_named_where_nothing_reads_it():
    with pytest.raises(FieldError, match="wave in 'extra_body' is not read"):
        take_fields({"extra_body": {"wave": 3}})
    for name in ("waves", "max_in_flights"):
        with pytest.raises(FieldError, match="did you mean 'max_in_flight'"):
            take_fields({name: 3})
    assert take_fields({"tools": [{"wave": 3}], "rows": 3}) == {}


def test_replace_and_attributes_have_old_names(tiny, capsys):
    params = replace(Params(9, decoder="wave"), wave=3)
    assert (params.max_in_flight, params.max_tokens, params.decoder) == (3, 9, "wave")
    assert replace(params, max_tokens=4).max_in_flight == 3
    assert replace(LaneConfig(), ticks=3, wave=2) == LaneConfig(passes_per_step=3, max_in_flight=2)
    old: Any = params
    assert old.wave == 3
    with pytest.raises(ValueError, match="two names of one value"):
        replace(params, max_in_flight=4, wave=5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rows'"):
        replace(params, rows=4)
    engine: Any = Engine(tiny, dtype="float32", max_num_seqs=3, max_model_len=40)
    engine.rows -= 1
    assert (engine.max_num_seqs, engine.rows, engine.length, engine.prompt_lanes) == (2, 2, 40, 512)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(set(lines)) == 6  # keywords wave, ticks; attributes wave, rows, length, prompt_lanes


def test_the_old_place_of_the_lane_config(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "loopwise.serve.vllm.lanes", raising=False)
    assert importlib.import_module("loopwise.serve.vllm.lanes").LaneConfig is LaneConfig
    assert capsys.readouterr().err == (
        "loopwise: warning: module 'loopwise.serve.vllm.lanes' is deprecated since loopwise 0.2.0: "
        "use 'loopwise.serve.api.lanes'\n"
    )


@pytest.mark.parametrize("value", ["auto", -1, None])
def test_measured_settings(value, tiny, tmp_path):
    lanes = LaneConfig(coda_wait=value, budget=value)
    assert (lanes.coda_wait, lanes.budget) == (AUTO, AUTO)
    text = "null" if value is None else value
    for recipe in (
        from_file(ServeRecipe, "serve", tmp_path, {"coda_wait": value, "budget": value}),
        from_settings(ServeRecipe, "serve", {"coda_wait": text, "budget": text}),
    ):
        assert (dict(recipe)["coda_wait"], dict(recipe)["budget"]) == (AUTO, AUTO)
    assert Engine(tiny, dtype="float32", coda_wait=value).loop.schedule.costs is not None


def test_other_settings_are_not_measured(tiny):
    assert Engine(tiny, dtype="float32").loop.schedule.costs is None
    for wrong in (-2, "Auto", True):
        with pytest.raises(ValueError, match="coda_wait="):
            Engine(tiny, coda_wait=wrong)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="coda_wait"):
            ServeRecipe.model_validate({"coda_wait": wrong})


def test_help_and_unknown_keys_name_todays_keys(capsys):
    for verb in ("generate", "serve"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        keys = {line.strip().partition(":")[0] for line in capsys.readouterr().out.splitlines() if line[:2] == "  "}
        assert keys & set(NAMES.values()) == {NAMES[old] for old in DOORS[f"{verb} recipe"].names}
        assert not keys & NAMES.keys()
