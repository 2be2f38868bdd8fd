"""Tables of plans: recipe and kinds of layers in, source layers of every part or a rejection out."""

from __future__ import annotations

from typing import Any

import pytest

from loopwise.convert.plan import Plan, make_plan
from loopwise.convert.recipe import ConvertRecipe
from loopwise.errors import UserError
from loopwise.recipe import validate

SAME = ["full"] * 6
MIXED = ["window", "window", "full"] * 2
INFLUENCE = [0.9, 0.1, 0.5, 0.2, 0.8, 0.7]
RECURSIVE: dict[str, Any] = {"method": "recursive", "loops": 2}
RETROFIT: dict[str, Any] = {"sizes": [1, 2, 1]}


def plan(keys: dict[str, Any], kinds: list[str] | None = None) -> Plan:
    recipe = validate(ConvertRecipe, keys)
    recipe.settle_init(64)
    return make_plan(recipe, kinds or SAME, lambda: INFLUENCE)


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        (RETROFIT, ([0], [3, 4], [5])),
        ({"sizes": [0, 1, 0]}, ([], [5], [])),
        ({"sizes": [1, 2, 1], "influence": "text"}, ([0], [2, 4], [5])),
        ({"layers": {"core": [4, 1]}}, ([], [4, 1], [])),
        ({"layers": {"prelude": [2], "core": [2], "coda": [0]}}, ([2], [2], [0])),
        (RECURSIVE, ([], [0, 2, 5], [])),
        ({**RECURSIVE, "init": "lower"}, ([], [0, 1, 2], [])),
        ({**RECURSIVE, "init": "upper"}, ([], [3, 4, 5], [])),
        ({**RECURSIVE, "init": "average"}, ([], [0, 1, 2], [])),
        ({**RECURSIVE, "sharing": "sequence", "init": "average"}, ([], [0, 2, 4], [])),
        ({**RECURSIVE, "sharing": "middle-cycle"}, ([0], [1, 4], [5])),
        ({**RECURSIVE, "loops": 6, "init": "lower"}, ([], [0], [])),
        ({"method": "mor", "loops": 4}, ([0], [1], [5])),
        ({"method": "universal", "init": "upper"}, ([], [5], [])),
    ],
)
def test_layers_of_the_parts(keys, layers):
    made = plan(keys)
    assert (made.prelude, made.core, made.coda) == layers


@pytest.mark.parametrize(
    ("keys", "parents", "stands_for"),
    [
        (RETROFIT, [[3], [4]], [[3, 4]] * 4),
        ({**RETROFIT, "num_recurrences": 2}, [[3], [4]], [[3, 4]] * 2),
        ({**RECURSIVE, "init": "average"}, [[0, 3], [1, 4], [2, 5]], [[0, 1, 2], [3, 4, 5]]),
        ({**RECURSIVE, "init": "random"}, [[], [], []], [[0, 1, 2], [3, 4, 5]]),
        ({**RECURSIVE, "init": "average", "sharing": "sequence"}, [[0, 1], [2, 3], [4, 5]], [[0, 2, 4], [1, 3, 5]]),
        ({**RECURSIVE, "init": "average", "sharing": "middle-cycle"}, [[1, 3], [2, 4]], [[1, 2], [3, 4]]),
        ({"method": "universal", "init": "average"}, [[0, 1, 2, 3, 4, 5]], [[n] for n in range(6)]),
    ],
)
def test_parents_and_the_layers_that_are_replaced(keys, parents, stands_for):
    made = plan(keys)
    assert made.parents["core"] == parents
    assert made.stands_for == stands_for


@pytest.mark.parametrize(
    ("keys", "kinds", "core"),
    [
        ({**RECURSIVE, "init": "stepwise"}, MIXED, [0, 1, 5]),  # the place of the second is a layer of another kind
        ({**RECURSIVE, "init": "upper"}, MIXED, [3, 4, 5]),
        ({**RECURSIVE, "init": "lower"}, ["a", "b", "c"] * 2, [0, 1, 2]),
    ],
)
def test_a_tied_layer_starts_as_one_of_its_kind(keys, kinds, core):
    made = plan(keys, kinds)
    assert made.core == core
    assert [kinds[layer] for layer in made.core] == kinds[:3]


@pytest.mark.parametrize(
    ("keys", "fields"),
    [
        (RETROFIT, {"injection": "linear", "state_init": "input", "num_recurrences": 4, "sharing": "cycle"}),
        ({**RETROFIT, "injection": "add"}, {"injection": "add", "state_init": "zeros"}),
        ({**RETROFIT, "injection": "add", "state_init": "normal"}, {"state_init": "normal"}),
        (RECURSIVE, {"injection": "none", "num_recurrences": 2, "sharing": "cycle", "recurrence_encoding": "none"}),
        ({**RECURSIVE, "num_recurrences": 5}, {"num_recurrences": 5}),
        ({**RECURSIVE, "sharing": "middle-sequence"}, {"sharing": "sequence"}),
        ({"method": "mor", "loops": 2}, {"sharing": "cycle", "injection": "none"}),
        ({"method": "universal"}, {"recurrence_encoding": "sinusoidal", "num_recurrences": 6}),
        ({"method": "universal", "recurrence_encoding": "none"}, {"recurrence_encoding": "none"}),
        ({**RETROFIT, "recurrence_norm": True}, {"recurrence_norm": "each"}),
        ({**RETROFIT, "halting": "act", "recurrence_residual": True}, {"halting": "act", "recurrence_residual": True}),
    ],
)
def test_fields_of_the_config(keys, fields):
    made = plan(keys)
    assert {name: getattr(made, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("keys", "kinds", "dropped"),
    [
        (RETROFIT, SAME, [1, 2]),
        (RECURSIVE, SAME, [1, 3, 4]),
        ({**RECURSIVE, "init": "average"}, SAME, []),
        ({**RECURSIVE, "init": "random"}, SAME, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_dropped_layers(keys, kinds, dropped):
    assert plan(keys, kinds).dropped(len(kinds)) == dropped


@pytest.mark.parametrize(
    ("keys", "kinds", "message"),
    [
        ({"sizes": [3, 3, 1]}, SAME, "sizes=3,3,1 need 7 layers; the source has 6"),
        ({"layers": {"core": [6]}}, SAME, "layers.core names layer 6; the source has layers 0 to 5"),
        ({"layers": {"core": [1], "coda": [-1]}}, SAME, "layers.coda names layer -1; the source has layers 0 to 5"),
        ({"layers": {"prelude": [0]}}, SAME, "layers.core is empty; name at least one source layer to recur"),
        ({**RECURSIVE, "loops": 4}, SAME, "loops=4 does not divide the source's 6 layers; choose from 1, 2, 3, 6"),
        (
            {"method": "mor", "loops": 3},
            SAME,
            "loops=3 does not divide the source's 4 layers between the first and the last; choose from 1, 2, 4",
        ),
        (
            {**RECURSIVE, "sharing": "middle-cycle"},
            ["full"] * 2,
            "loops=2 does not divide the source's 0 layers between the first and the last; choose from none",
        ),
        (
            {**RECURSIVE, "loops": 3},
            MIXED,
            "loops=3, sharing=cycle ties layers of different attention types or structure (0 window, 2 full); "
            "choose other loops",
        ),
        (
            {"method": "universal"},
            MIXED,
            "method=universal ties layers of different attention types or structure (0 window, 2 full); use "
            "method=recursive with loops that keep them apart",
        ),
    ],
)
def test_rejections(keys, kinds, message):
    with pytest.raises(UserError) as error:
        plan(keys, kinds)
    assert str(error.value) == message
