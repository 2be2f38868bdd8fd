"""Tables of convert recipes: keys in, settled values or a rejection out; choices equal those of the model's config."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from loopwise.convert.recipe import TARGETS, ConvertRecipe, Exit, Lora, Router
from loopwise.errors import UserError
from loopwise.model import configuration_recurrent_depth as config
from loopwise.model import configuration_router as router
from loopwise.recipe import validate

RECURSIVE: dict[str, Any] = {"method": "recursive", "loops": 2}


def choices(section: type[BaseModel], key: str) -> tuple[str, ...]:
    """The values that a key takes."""
    annotation = section.model_fields[key].annotation
    options = [annotation] if get_origin(annotation) is Literal else get_args(annotation)
    return next(get_args(option) for option in options if get_origin(option) is Literal)


@pytest.mark.parametrize(
    ("section", "key", "wanted"),
    [
        (ConvertRecipe, "injection", [kind for kind in config.INJECTIONS if kind != "diagonal"]),  # of imports alone
        (ConvertRecipe, "state_init", config.STATE_INITS),
        (ConvertRecipe, "recurrence_encoding", config.ENCODINGS),
        (ConvertRecipe, "halting", config.HALTINGS),
        (ConvertRecipe, "sharing", (*config.SHARINGS, *(f"middle-{name}" for name in config.SHARINGS))),
        (Exit, "rule", config.EXIT_RULES),
        (Router, "kind", router.KINDS),
        (Router, "network", router.NETWORKS),
        (Router, "kv", router.KEYS_AND_VALUES),
        (Router, "inference", router.INFERENCES),
        (Router, "gate", ("sigmoid", "tanh", "softmax")),
    ],
)
def test_choices_are_those_of_the_config(section, key, wanted):
    """`--help` reads the recipe without torch, which the config needs; so the choices stand in both."""
    assert list(choices(section, key)) == list(wanted)


def test_gates_are_those_of_the_config():
    assert set(choices(Router, "gate")) == {gate for gates in router.GATES.values() for gate in gates}


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"sizes": [1, 2, 1]}, {"method": "retrofit"}),
        ({"layers": {"core": [1]}}, {"method": "retrofit"}),
        ({"sizes": "1,2,1"}, {"sizes": [1, 2, 1]}),
        ({}, {"method": None, "kv_policy": "per-depth", "seed": 0}),
        ({"method": "mor", "loops": 2}, {"router": Router.model_validate({})}),
        ({"method": "mor", "loops": 2, "router": {"kind": "token"}}, {"router": Router(kind="token")}),  # pyright: ignore
    ],
)
def test_values(keys, wanted):
    recipe = validate(ConvertRecipe, keys)
    assert {name: getattr(recipe, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("keys", "hidden_size", "init"),
    [
        (RECURSIVE, 64, "stepwise"),
        ({**RECURSIVE, "lora": {"rank": 15}}, 64, "stepwise"),
        ({**RECURSIVE, "lora": {"rank": 16}}, 64, "average"),
        ({**RECURSIVE, "lora": {"rank": {"q": 4, "down": 16}}}, 64, "average"),
        ({**RECURSIVE, "lora": {"rank": 16, "init": "zero"}}, 64, "stepwise"),
        ({**RECURSIVE, "lora": {"rank": 16}, "init": "upper"}, 64, "upper"),
        ({"method": "universal"}, 64, "stepwise"),
        ({"sizes": [1, 2, 1], "lora": {"rank": 64}}, 64, None),
    ],
)
def test_init_is_settled(keys, hidden_size, init):
    recipe = validate(ConvertRecipe, keys)
    recipe.settle_init(hidden_size)
    assert recipe.init == init


@pytest.mark.parametrize(
    ("lora", "ranks"),
    [
        ({"rank": 8}, dict.fromkeys(TARGETS, 8)),
        ({"rank": 8, "targets": ["q", "v"]}, {"q": 8, "v": 8}),
        ({"rank": {"q": 8, "down": 32}}, {"q": 8, "down": 32}),
    ],
)
def test_ranks(lora, ranks):
    assert validate(Lora, lora).ranks() == ranks


@pytest.mark.parametrize(
    ("keys", "fields"),
    [
        ({}, {"kind": "expert", "depths": 3}),
        ({"kind": "token", "alpha": 0.5}, {"kind": "token", "depths": 3, "alpha": 0.5}),
        ({"capacity": [1, 0.5, 0.5]}, {"kind": "expert", "depths": 3, "capacity": [1.0, 0.5, 0.5]}),
    ],
)
def test_router_fields(keys, fields):
    assert validate(Router, keys).fields(3) == fields


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "recursive"}, "method=recursive needs loops=B, the number of times that the tied layers run"),
        ({"method": "mor"}, "method=mor needs loops=B, the number of times that the tied layers run"),
        ({**RECURSIVE, "sizes": [1, 1, 1]}, "sizes belongs to method=retrofit; method=recursive takes loops and init"),
        (
            {**RECURSIVE, "influence": "t"},
            "influence belongs to method=retrofit; method=recursive takes loops and init",
        ),
        (
            {"method": "universal", "loops": 2},
            "method=universal ties all layers into one: leave loops out, num_recurrences is free",
        ),
        ({"sizes": [1, 2, 1], "loops": 2}, "loops belongs to method=recursive; method=retrofit takes sizes or layers"),
        (
            {"sizes": [1, 2, 1], "init": "lower"},
            "init belongs to method=recursive; method=retrofit takes sizes or layers",
        ),
        (
            {"method": "retrofit"},
            "method=retrofit needs either sizes=P,C,D or layers.prelude, layers.core, layers.coda",
        ),
        (
            {"sizes": [1, 0, 1]},
            "sizes=[1, 0, 1]: three counts P,C,D, none negative, with at least one core layer",
        ),
        ({"sizes": [1, 2]}, "sizes=[1, 2]: three counts P,C,D, none negative, with at least one core layer"),
        (
            {"layers": {"core": [1]}, "influence": "t"},
            "influence chooses layers for sizes=P,C,D, and layers are given: leave one out",
        ),
        (
            {"sizes": [1, 2, 1], "lora": {"rank": 2, "init": "svd"}},
            "lora.init=svd belongs to method=recursive: retrofit ties no two layers, use zero",
        ),
        (
            {**RECURSIVE, "init": "random", "lora": {"rank": 2, "init": "svd"}},
            "lora.init=svd with init=random would approximate the source by noise; use lora.init=zero",
        ),
        (
            {"sizes": [1, 2, 1], "injection": "gated", "state_init": "zeros"},
            "injection=gated keeps the source only from state_init=input, not zeros",
        ),
        (
            {**RECURSIVE, "lora": {"rank": {"q": 2}, "targets": ["q"]}},
            "lora: rank names its targets; leave targets out",
        ),
        (
            {**RECURSIVE, "lora": {"rank": {"x": 2}}},
            "lora.rank: an integer above 0, or one for each target of q, k, v, o, gate, up, down, as {q: 8, down: 32}",
        ),
        ({**RECURSIVE, "loops": 4097}, "loops=4097: Input should be less than or equal to 4096"),
        ({"seed": -1}, "seed=-1: Input should be greater than or equal to 0"),
    ],
)
def test_rejections(keys, message):
    with pytest.raises(UserError) as error:
        validate(ConvertRecipe, keys)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("keys", "unused"),
    [
        ({}, ["state_std"]),
        ({"state_init": "normal"}, []),
        ({"state_init": "normal", "exit": {"rule": "kl"}}, []),
        ({**RECURSIVE, "state_init": "normal", "sharing": "sequence", "exit": {"rule": "kl"}}, ["exit.rule"]),
        ({"method": "mor", "loops": 2, "state_init": "normal", "exit": {"rule": "kl"}}, ["exit.rule"]),
    ],
)
def test_keys_without_effect(keys, unused):
    assert [one.key for one in validate(ConvertRecipe, keys).unused()] == unused
