"""Old names: accepted, with one warning line where they are deprecated; both names of a value are refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from loopwise import deprecated
from loopwise.deprecated import RECIPE_KEYS, Renamed, rename
from loopwise.errors import UserError
from loopwise.recipe import Section, load_recipe
from loopwise.train.recipe import Train

TABLE = {"wave": Renamed("max_in_flight", "0.2"), "colour": Renamed("color")}


@pytest.fixture(autouse=True)
def _nothing_warned(monkeypatch):
    monkeypatch.setattr(deprecated, "_warned", set())


class Lanes(Section):
    max_in_flight: int = 8
    color: str = "red"


class Command(Section):
    lanes: Lanes = Lanes()
    more: list[Lanes] = []
    wave: str = "a decoder of that name"


def test_old_names_become_todays_in_order_and_warn_once(capsys):
    lines: list[str] = []
    known = ("max_in_flight", "color", "other")
    for _ in range(2):
        assert list(rename({"other": 1, "wave": 2, "colour": 3}, TABLE, known, "request field", lines.append)) == [
            "other",
            "max_in_flight",
            "color",
        ]
    assert lines == ["warning: request field 'wave' is deprecated since loopwise 0.2: use 'max_in_flight'"]
    assert rename({"wave": 2}, TABLE, known, "keyword") == {"max_in_flight": 2}  # another kind warns again
    assert capsys.readouterr().err == (
        "loopwise: warning: keyword 'wave' is deprecated since loopwise 0.2: use 'max_in_flight'\n"
    )


def test_both_names_of_one_value_are_refused():
    with pytest.raises(UserError, match=r"^config fields 'wave' and 'max_in_flight' are two names of one value"):
        rename({"wave": 2, "max_in_flight": 2}, TABLE, ("max_in_flight",), "config field")


def test_a_name_stays_where_the_new_one_is_unknown_or_the_old_one_means_something():
    assert rename({"wave": 2}, TABLE, ("width",), "recipe key") == {"wave": 2}
    assert rename({"wave": 2}, TABLE, ("wave", "max_in_flight"), "recipe key") == {"wave": 2}


@pytest.mark.parametrize("way", ["file", "settings", "python"])
def test_sections_lists_and_settings_take_old_keys(way, tmp_path, monkeypatch, capsys):
    for name, entry in TABLE.items():
        monkeypatch.setitem(RECIPE_KEYS, name, entry)
    values: dict[str, Any] = {"lanes": {"wave": 3, "colour": "blue"}, "more": [{"wave": 4}], "wave": "as it is"}
    if way == "file":
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        made = load_recipe(Command, "train", str(tmp_path / "recipe.yaml"), [])
    elif way == "settings":
        settings = ["lanes.wave=3", "lanes.colour=blue", "more=[{wave: 4}]", "wave=as it is"]
        made = load_recipe(Command, "train", None, settings)
    else:
        made = Command.model_validate(values)
    assert made.lanes.max_in_flight == 3
    assert made.lanes.color == "blue"
    assert made.more[0].max_in_flight == 4
    assert made.wave == "as it is"
    assert capsys.readouterr().err.splitlines() == [
        "loopwise: warning: recipe key 'wave' is deprecated since loopwise 0.2: use 'max_in_flight'"
    ]


@pytest.mark.parametrize("in_file", ["optimiser", "optimizer"])
@pytest.mark.parametrize("given", ["optimiser", "optimizer"])
def test_optimizer_is_accepted_for_optimiser(in_file, given, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"data": {"train": "a.txt"}, in_file: {"kind": "muon", "learning_rate": 0.5}}))
    made = load_recipe(Train, "train", str(file), [f"{given}.muon_momentum=0.5"])
    assert (made.optimiser.kind, made.optimiser.learning_rate, made.optimiser.muon_momentum) == ("muon", 0.5, 0.5)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"optimiser\.muon_momentum=0\.95 has no effect"):  # also by its other name
        load_recipe(Train, "train", str(file), [f"{given}.kind=adamw", f"{given}.muon_momentum=0.95"])
    with pytest.raises(UserError, match=r"optimiser\.kind='sgd'"):
        load_recipe(Train, "train", str(file), [f"{given}.kind=sgd"])


def test_both_spellings_are_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("data: {train: a.txt}\noptimiser: {kind: muon}\noptimizer: {kind: adamw}\n")
    with pytest.raises(UserError, match="'optimizer' and 'optimiser' are two names of one value"):
        load_recipe(Train, "train", str(file), [])
    with pytest.raises(UserError, match=r"^optimizer\.kind and optimiser\.kind are two names of one recipe key"):
        load_recipe(Train, "train", None, ["data.train=a", "optimizer.kind=muon", "optimiser.kind=adamw"])
    with pytest.raises(ValueError, match="two names of one value"):
        Train.model_validate({"data": {"train": "a"}, "optimiser": {}, "optimizer": {}})
