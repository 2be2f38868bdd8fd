"""A request's depth: its own fields, then the model's defaults; one answer in every engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loopwise.errors import UserError
from loopwise.recipe import validate
from loopwise.serve import Engine, Params
from loopwise.serve.api.depth import Depth, depth_of
from loopwise.serve.api.fields import FieldError
from loopwise.serve.api.limits import Limits
from loopwise.serve.api.validation import validate_params
from loopwise.serve.checkpoint import Facts
from loopwise.serve.defaults import choose
from loopwise.serve.recipe import ServeRecipe
from tests.helpers.serve_tiny import GROUPED, RETROFIT, prompts, save, source_config

DEFAULT = {"rule": "latent-diff", "threshold": 10.0, "min_recurrences": 4}  # which fires as soon as it may


@pytest.mark.parametrize(
    ("given", "depth"),
    [
        ({}, Depth(4, 4, "latent-diff", 10.0, False, [])),
        ({"num_recurrences": 2}, Depth(2, 2, "latent-diff", 10.0, False, [])),
        ({"num_recurrences": 6}, Depth(6, 4, "latent-diff", 10.0, False, [])),
        ({"num_recurrences": 6, "min_recurrences": 5}, Depth(6, 5, "latent-diff", 10.0, False, [])),
        ({"min_recurrences": 1, "exit_threshold": 1}, Depth(4, 1, "latent-diff", 1.0, False, [])),
        ({"exit_rule": "cosine"}, Depth(4, 4, "cosine", 1e-3, False, [])),
        ({"exit_rule": "fixed", "trace": [1, 2], "prompt_exit": 1}, Depth(4, 4, "fixed", 0.0, True, [1, 2])),
        (dict.fromkeys(("num_recurrences", "min_recurrences", "trace")), Depth(4, 4, "latent-diff", 10.0, False, [])),
    ],
)
def test_defaults_are_the_models_and_never_deeper_than_the_request(given, depth):
    assert depth_of(given, 4, DEFAULT) == depth


@pytest.mark.parametrize("default", [DEFAULT, None])
@pytest.mark.parametrize("given", [{"num_recurrences": 2, "min_recurrences": 3}, {"min_recurrences": 5}])
def test_a_request_that_contradicts_itself_is_refused_by_name(given, default):
    most = given.get("num_recurrences", 4)
    said = f"min_recurrences={given['min_recurrences']}: at most num_recurrences, which is {most}"
    with pytest.raises(FieldError, match=said):
        depth_of(given, 4, default)
    with pytest.raises(FieldError, match=said):
        validate_params(SimpleNamespace(extra_args=given), Limits(4, 8, ("fixed", "latent-diff"), prompt_exit=False))


@pytest.mark.parametrize(("recipe", "kept"), [({}, 4), ({"num_recurrences": 2}, 4), ({"max_recurrences": 3}, 3)])
def test_a_server_keeps_the_models_default(recipe, kept):
    """Its own num_recurrences may be below: requests that go deeper have the same exit as without a server."""
    facts = Facts("llama", 4, 8, "last-exited", DEFAULT, False, "cycle")
    config = choose(facts, validate(ServeRecipe, recipe)).config
    assert config["exit"] == {**DEFAULT, "min_recurrences": kept}
    for given in ({}, {"num_recurrences": 1}, {"num_recurrences": 3}, {"num_recurrences": config["max_recurrences"]}):
        assert depth_of(given, config["num_recurrences"], config["exit"]) == depth_of(
            given, config["num_recurrences"], DEFAULT
        )


def test_the_line_of_a_server_has_the_depths_of_a_request_that_names_none():
    facts = Facts("llama", 4, 8, "last-exited", DEFAULT, False, "cycle")
    line = choose(facts, validate(ServeRecipe, {"num_recurrences": 2})).line()
    assert "num_recurrences=2 (a request may ask for 1 to 8)" in line
    assert "min_recurrences=2," in line
    with pytest.raises(UserError, match=r"^min_recurrences=3: at most num_recurrences, which is 2$"):
        choose(facts, validate(ServeRecipe, {"num_recurrences": 2, "min_recurrences": 3}))


def test_the_offline_engine(tmp_path):
    save(tmp_path, source_config("llama", **GROUPED), **RETROFIT, num_recurrences=4, exit=DEFAULT)
    engine = Engine(tmp_path, max_num_seqs=2, max_model_len=64, dtype="float32")
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 4),
        ({"num_recurrences": 2}, 2),
        ({"num_recurrences": 6, "min_recurrences": 1}, 1),
    ]
    for given, depth in cases:
        (done,) = engine.generate([prompts()[1]], Params(6, ignore_eos=True, **given))
        assert done.depths[1:] == [depth] * 5, given  # the first token is the prompt's, at full depth
    with pytest.raises(UserError, match=r"^min_recurrences=3: at most num_recurrences, which is 2$"):
        engine.request(Params(num_recurrences=2, min_recurrences=3))
