"""The recipe of `loopwise train`: settings that turn others off, items of lists, names that are near."""

from __future__ import annotations

import re
from typing import Any

import pytest

from loopwise.errors import UserError, nearest
from loopwise.train.recipe import Train
from loopwise.unused import _setting, unused
from tests.helpers.recipes import NEEDED, keys, load


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("retrofit", ["optimiser.kind=adamw", "optimiser.schedule=cosine"]),
        ("retrofit", ["recurrence.sampler=fixed"]),
        ("retrofit", ["recurrence.schedule=steps", "recurrence.levels={0: 2, 0.5: 4}"]),
        ("mor-expert", ["optimiser.schedule=linear"]),
        ("ouro-1", ["objectives.exit_gate.stage=gate"]),
        ("sft", ["data.chat_field=null"]),
    ],
)
def test_what_a_shipped_recipe_sets_may_be_turned_off(recipe, settings):
    assert not _set_in_vain(load("train", *NEEDED["train"], *settings, recipe=recipe))


def _set_in_vain(recipe: Any) -> list[str]:
    found = [(one.key, *_setting(recipe, one.key)) for one in unused(recipe)]
    return [key for key, value, is_set, default in found if is_set and value != default]


def test_a_users_file_sets_nothing_in_vain(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("data: {train: text.txt}\noptimiser: {muon_momentum: 0.5}\n")
    with pytest.raises(UserError, match=r"^optimiser\.muon_momentum=0.5 has no effect: it belongs to"):
        load("train", recipe=str(file))
    load("train", "optimiser.kind=muon", recipe=str(file))
    with pytest.raises(UserError, match="has no effect"):  # the command line asks for it anew
        load("train", "optimiser.kind=adamw", "optimiser.muon_momentum=0.9", recipe=str(file))
    recipe = load("train", "optimiser.kind=adamw", recipe=str(file))
    assert recipe.optimiser.muon_momentum == 0.95  # what has no effect is not kept, and not written down


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("recurrence.eval_at=1,0", "recurrence.eval_at=0: Input should be greater than 0"),
        ("recurrence.levels={0: 1, 0.5: x}", "recurrence.levels='x': Input should be a valid integer"),
        ("data.phases=[{share: x, sources: {a: 1}}]", "data.phases.0.share='x': Input should be a valid number"),
    ],
)
def test_a_wrong_item_of_a_list_is_named_by_its_value(setting, line):
    with pytest.raises(UserError, match=re.escape(line)):
        load("train", "data.train=text.txt", setting)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("optimiser.lr", "optimiser.learning_rate"),
        ("lr", "optimiser.learning_rate"),
        ("learning_rate", "optimiser.learning_rate"),
        ("data.trian", "data.train"),
        ("recurrence.men", "recurrence.mean"),
        ("optimizr", "optimiser"),
        ("stesp", "steps"),
    ],
)
def test_an_unknown_key_names_the_nearest_and_few_others(key, near):
    with pytest.raises(UserError) as caught:
        load("train", "data.train=text.txt", f"{key}=1")
    assert f"unknown recipe key {key!r}: did you mean {near!r}?" in str(caught.value)
    assert len(str(caught.value)) < 250
    assert nearest("zzzz", [key for key, _ in keys(Train)]) == []


@pytest.mark.parametrize("name", ["optimiser", "optimizer"])
def test_both_spellings_of_optimiser(name, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"{name}: {{kind: muon, muon_momentum: 0.5}}\n")
    recipe = load("train", "data.train=text.txt", "optimizer.clip=2", recipe=str(tmp_path / "recipe.yaml"))
    assert (recipe.optimiser.kind, recipe.optimiser.clip) == ("muon", 2.0)
    assert "optimizer" not in recipe.model_dump()
    # A setting of the command line turns off the file's, in either spelling.
    recipe = load("train", "data.train=text.txt", "optimizer.kind=adamw", recipe=str(tmp_path / "recipe.yaml"))
    assert recipe.optimiser.muon_momentum == 0.95
    with pytest.raises(UserError, match=r"^optimiser\.muon_momentum=0.9 has no effect"):
        load("train", "data.train=text.txt", "optimizer.muon_momentum=0.9")
    assert Train.model_validate({"data": {"train": "a.txt"}, name: {"kind": "muon"}}).optimiser.kind == "muon"


def test_both_spellings_at_once_are_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("optimiser: {clip: 2}\noptimizer: {clip: 3}\n")
    with pytest.raises(UserError, match="recipe keys 'optimizer' and 'optimiser' are two names of one value"):
        load("train", "data.train=text.txt", recipe=str(tmp_path / "recipe.yaml"))


def test_runs_are_compared_by_the_places_of_local_names(tmp_path, monkeypatch):
    """A name in another directory may be another file, and another name the same one. Names of the hub stay."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text("text")

    def facts(here: str, name: str) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path / here)
        phases = f"data.phases=[{{share: 1, sources: {{{name}: 1, them/text: 2}}}}]"
        held_out = f"data.eval={name.replace('t.', '*.')},task:hops?hops=1"
        return load("train", phases, held_out, "steps=1", f"objectives.distillation.teacher={name}").facts()

    found = facts("a", "text.txt")
    assert found == facts(".", "a/text.txt") == facts("b", "../b/../a/text.txt") == facts(".", f"{tmp_path}/a/text.txt")
    assert found != facts("b", "text.txt")
    assert [*found["data"]["phases"][0]["sources"]] == [str(tmp_path / "a/text.txt"), "them/text"]
    assert found["data"]["eval"][1].startswith("task:hops?hops=1")
