"""Request fields about depth: every mistake is named with its field, the rule and the choices."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.serve.api.decoders import decoder_of
from loopwise.serve.api.fields import FIELDS, FieldError, parse_body, take_fields
from loopwise.serve.api.lanes import LANES as LANES_KEY
from loopwise.serve.api.lanes import LaneConfig
from loopwise.serve.api.limits import Limits
from loopwise.serve.api.validation import validate_fields, validate_params

RULES = ("fixed", "latent-diff", "cosine", "gate", "argmax-stability")
LANES = Limits(4, 8, RULES, prompt_exit=True)
FIXED = Limits(4, 8, (), prompt_exit=False, fixed=True)


def refusal(values: dict, limits: Limits = LANES) -> FieldError:
    with pytest.raises(FieldError) as caught:
        validate_fields(values, limits)
    return caught.value


@pytest.mark.parametrize("value", [0, 9, -1, 2.0, "4", True, False, [4], {}, math.nan, math.inf, 10**30])
@pytest.mark.parametrize("field", ["num_recurrences", "min_recurrences"])
def test_a_depth_is_an_integer_within_the_models(field, value):
    error = refusal({field: value})
    assert error.field == field
    assert f"{field}={value!r}: an integer from 1 to 8" in str(error)


def test_the_least_depth_is_not_above_the_greatest():
    assert refusal({"num_recurrences": 2, "min_recurrences": 3}).field == "min_recurrences"
    assert "at most num_recurrences, which is 4" in str(refusal({"min_recurrences": 5}))
    assert validate_fields({"num_recurrences": 8, "min_recurrences": 5}, LANES) == {
        "num_recurrences": 8,
        "min_recurrences": 5,
    }


@pytest.mark.parametrize("value", ["latent_diff", "Fixed", "", 3, True, ["fixed"], "replay"])
def test_an_unknown_rule_gets_the_choices(value):
    error = refusal({"exit_rule": value})
    assert error.field == "exit_rule"
    assert "choose from fixed, latent-diff, cosine, gate, argmax-stability" in str(error)
    if value == "latent_diff":
        assert "did you mean 'latent-diff'?" in str(error)


@pytest.mark.parametrize("value", [True, "0.1", math.nan, math.inf, -math.inf, 1e300, 10**400, [0.1], {}])
def test_a_threshold_is_a_finite_number(value):
    error = refusal({"exit_rule": "cosine", "exit_threshold": value})
    assert error.field == "exit_threshold"
    assert "a finite number" in str(error)


@pytest.mark.parametrize(
    ("rule", "value", "said"),
    [
        ("fixed", 0.1, "has no threshold"),
        (None, 0.1, "has no threshold"),
        ("cosine", -0.1, "at least 0"),
        ("argmax-stability", 2.5, "an integer from 1"),
        ("argmax-stability", 0, "an integer from 1"),
        ("gate", 1.5, "from 0 to 1"),
    ],
)
def test_a_threshold_fits_its_rule(rule, value, said):
    error = refusal({"exit_threshold": value} | ({"exit_rule": rule} if rule else {}))
    assert (error.field, said in str(error)) == ("exit_threshold", True)


@pytest.mark.parametrize("field", ["prompt_exit", "return_recurrences"])
@pytest.mark.parametrize("value", [0, 1, "true", 1.0, []])
def test_flags_are_true_or_false(field, value):
    error = refusal({field: value})
    assert (error.field, "true or false" in str(error)) == (field, True)


def test_prompts_exit_only_where_that_saves_work():
    error = refusal({"prompt_exit": True}, Limits(4, 8, RULES, prompt_exit=False))
    assert (error.field, "last-exited" in str(error)) == ("prompt_exit", True)
    coda = Limits(4, 8, RULES, prompt_exit=True, rule="kl", prompt_rules=("fixed", "cosine"))
    error = refusal({"prompt_exit": True}, coda)
    assert (error.field, "'kl' reads logits" in str(error)) == ("prompt_exit", True)
    assert validate_fields({"prompt_exit": True, "exit_rule": "cosine"}, coda)["exit_rule"] == "cosine"
    assert validate_fields({"prompt_exit": True, "return_recurrences": False}, LANES) == {
        "prompt_exit": 1,
        "return_recurrences": 0,
    }


@pytest.mark.parametrize("trace", [[], [0], [5], [1, True], [1.0], "1", 3, [[1]]])
def test_a_trace_is_a_list_of_depths(trace):
    assert refusal({"trace": trace}).field == "trace"


def test_a_trace_stands_alone():
    assert "exit_rule" in str(refusal({"trace": [1, 2], "exit_rule": "fixed"}))
    assert validate_fields({"trace": [1, 8], "num_recurrences": 8}, LANES) == {"trace": [1, 8], "num_recurrences": 8}


DIFFUSION = {"decoder": "diffusion"}
WAVE = {"decoder": "wave"}


@pytest.mark.parametrize(
    ("values", "field", "said"),
    [
        ({"decoder": "Wave"}, "decoder", "choose from plain, wave, diffusion"),
        ({"decoder": 3}, "decoder", "choose from plain, wave, diffusion"),
        ({"decoder": "wave", "max_in_flight": 9}, "max_in_flight", "an integer from 1 to 8"),
        ({"decoder": "wave", "max_in_flight": True}, "max_in_flight", "an integer from 1 to 8"),
        ({"decoder": "diffusion", "max_in_flight": 1}, "max_in_flight", "an integer from 2 to 8"),
        ({"max_in_flight": 2}, "max_in_flight", "decoder='plain' has one position"),
        ({"max_in_flight": "auto"}, "max_in_flight", "max_in_flight='auto': decoder='plain' has one position"),
        (
            {**WAVE, "max_in_flight": "wide"},
            "max_in_flight",
            "'wide': an integer from 1 to 8, the server's max_in_flight",
        ),
        ({**WAVE, "max_in_flight": 9}, "max_in_flight", "or 'auto'"),
        (
            {"decoder": "diffusion", "max_in_flight": "auto"},
            "max_in_flight",
            "needs a number, as its text depends on it",
        ),
        ({"draft_every": 2}, "draft_every", "draft_every=2: belongs to decoder='wave', and the decoder is 'plain'"),
        (
            {**WAVE, "draft_every": 9},
            "draft_every",
            "draft_every=9: an integer from 1 to 8, this model's max_recurrences",
        ),
        ({**WAVE, "draft_every": 0}, "draft_every", "this model's max_recurrences, or 'auto'"),
        ({**WAVE, "draft_every": True}, "draft_every", "an integer from 1 to 8"),
        ({**WAVE, "draft_every": 1, "draft_depths": [1]}, "draft_depths", "give draft_every or draft_depths, not both"),
        ({**WAVE, "draft_depths": [2, 9]}, "draft_depths", "[2, 9]: a list of depths from 1 to 8"),
        ({**WAVE, "draft_depths": [2, 1]}, "draft_depths", "in rising order"),
        ({**WAVE, "draft_depths": []}, "draft_depths", "a list of depths"),
        ({**WAVE, "draft_depths": [1.0]}, "draft_depths", "a list of depths"),
        ({**WAVE, "draft_depths": 2}, "draft_depths", "draft_depths=2: a list of depths"),
        ({"decoder": "wave", "diffusion": {}}, "diffusion", "belongs to decoder='diffusion'"),
        ({**DIFFUSION, "exit_rule": "cosine"}, "exit_rule", "diffusion.freeze"),
        ({**DIFFUSION, "trace": [1]}, "trace", "diffusion.freeze"),
        (
            {**DIFFUSION, "diffusion": {"iner": 4}},
            "diffusion",
            "diffusion.iner: no such field; they are inner, headway",
        ),
        (
            {**DIFFUSION, "diffusion": {"inner": 5}},
            "diffusion",
            "diffusion.inner=5: at most num_recurrences, which is 4",
        ),
        ({**DIFFUSION, "diffusion": {"inner": True}}, "diffusion", "diffusion.inner=True: an integer"),
        ({**DIFFUSION, "diffusion": {"ema": 1.5}}, "diffusion", "diffusion.ema=1.5: a share, from 0 to 1"),
        ({**DIFFUSION, "diffusion": {"threshold": math.nan}}, "diffusion", "a finite number"),
        ({**DIFFUSION, "diffusion": {"headway": 10**30}}, "diffusion", "diffusion.headway"),
        ({**DIFFUSION, "diffusion": {"freeze": "latent"}}, "diffusion", "choose from latent-diff, acceleration"),
        ({**DIFFUSION, "diffusion": "inner=4"}, "diffusion", "an object of inner, headway"),
    ],
)
def test_decoders_and_what_they_take(values, field, said):
    error = refusal(values)
    assert (error.field, said in str(error)) == (field, True), str(error)


def test_depths_at_which_a_wave_drafts():
    """A request's own, else the server's; "auto" is as wide as they make a wave of the request's depth."""

    def decoder(**fields: object) -> tuple:
        params = SimpleNamespace(extra_args={**WAVE, **validate_fields({**WAVE, **fields}, LANES)})
        made = decoder_of(params, "plain", 8, 2, ())
        return made.max_in_flight, made.draft_every, made.draft_depths

    assert decoder() == (8, 2, ())
    assert decoder(draft_every=3, max_in_flight=4) == (4, 3, ())
    assert decoder(draft_depths=[1, 2, 4]) == (8, 1, (1, 2, 4))
    assert decoder(max_in_flight="auto", num_recurrences=7) == (4, 2, ())
    assert decoder(max_in_flight="auto", num_recurrences=7, draft_every=1) == (7, 1, ())
    assert decoder(max_in_flight="auto", num_recurrences=7, draft_depths=[3, 4]) == (3, 1, (3, 4))
    assert decoder(max_in_flight="auto") == (8, 2, ())
    assert decoder(draft_every="auto", max_in_flight="auto", num_recurrences=7) == (7, 0, ())


@pytest.mark.parametrize(
    ("settings", "depth", "width", "every"),
    [
        ({"max_in_flight": "auto", "draft_every": 4}, 32, 8, 4),
        ({"max_in_flight": -1, "draft_depths": [1, 2]}, 99, 32, 1),
        ({"max_in_flight": "auto", "draft_every": "auto"}, 8, 8, 0),
        ({"max_in_flight": 3}, 8, 3, 1),
    ],
)
def test_a_server_is_as_wide_as_its_waves_can_use(settings, depth, width, every):
    model = SimpleNamespace(hf_config=SimpleNamespace(max_recurrences=depth))
    lanes = LaneConfig.of(SimpleNamespace(additional_config={LANES_KEY: settings}, model_config=model))
    assert (lanes.max_in_flight, lanes.draft_every) == (width, every)


def test_a_diffusion_is_handed_on_as_text():
    given = {**DIFFUSION, "max_in_flight": 4, "diffusion": {"inner": 2, "threshold": 0.1}}
    handed = validate_fields(given, LANES)
    assert json.loads(handed["diffusion"]) == given["diffusion"]
    assert validate_fields(handed, LANES) == handed


@pytest.mark.parametrize(
    "values", [{"logprobs": 1}, {"presence_penalty": 0.5}, {"min_tokens": 3}, {"bad_words": ["a"]}]
)
def test_a_diffusion_cannot_look_back(values):
    params = SimpleNamespace(**values, extra_args=DIFFUSION)
    with pytest.raises(FieldError, match="decoder='plain' or 'wave'") as caught:
        validate_params(params, LANES)
    assert caught.value.field == next(iter(values))
    assert decoder_of(SimpleNamespace(**values, extra_args={"decoder": "wave"}), "plain", 8).name == "plain"
    assert decoder_of(SimpleNamespace(temperature=1.0, extra_args={}), "wave", 8).max_in_flight == 8


def test_log_probabilities_that_the_engine_computes_keep_a_wave():
    def name(raw: bool, **values: object) -> str:
        params, mode = (
            SimpleNamespace(**values, extra_args={"decoder": "wave"}),
            "raw_logprobs" if raw else "raw_logits",
        )
        return decoder_of(params, "plain", 8, logprobs_mode=mode).name

    assert [name(True, logprobs=n) for n in (0, 20, 21, -1)] == ["wave", "wave", "plain", "plain"]
    assert name(False, logprobs=1) == name(True, logprobs=1, min_tokens=3) == "plain"
    assert name(True, logprobs=1, logprob_token_ids=[5]) == "plain"


def test_a_model_says_which_decoders_do_not_go_with_it():
    limits = replace(LANES, unfit={"wave": "a wave needs more"}, decoder="plain")
    assert "a wave needs more" in str(refusal({"decoder": "wave"}, limits))
    routed = replace(LANES, routed=True, rules=("fixed",))
    for name, value in {"num_recurrences": 3, "exit_rule": "cosine", "trace": [1], "min_recurrences": 1}.items():
        assert refusal({name: value}, routed).field == name


def test_an_engine_of_one_depth_takes_that_depth_alone():
    assert validate_fields({"num_recurrences": 4, "exit_rule": "fixed", "return_recurrences": True}, FIXED) == {
        "return_recurrences": 1
    }
    for values in ({"num_recurrences": 3}, {"exit_rule": "cosine"}, {"exit_threshold": 0.1}, {"trace": [4]}):
        error = refusal(values, FIXED)
        assert (error.field, "engine=lanes" in str(error)) == (next(iter(values)), True)


def test_fields_are_taken_from_the_body_and_from_vllm_xargs():
    body = {"prompt": "a", "num_recurrences": 3, "exit_rule": None, "vllm_xargs": {"exit_threshold": 0.2, "other": 1}}
    assert take_fields(body) == {"num_recurrences": 3, "exit_threshold": 0.2}
    assert body == {"prompt": "a", "vllm_xargs": {"other": 1}}


def test_a_field_cannot_say_two_things():
    with pytest.raises(FieldError, match="num_recurrences is 3 in the body, but 4 in vllm_xargs"):
        take_fields({"num_recurrences": 3, "vllm_xargs": {"num_recurrences": 4}})
    with pytest.raises(FieldError, match="num_recurrences is True in the body, but 1 in vllm_xargs"):
        take_fields({"num_recurrences": True, "vllm_xargs": {"num_recurrences": 1}})
    assert take_fields({"num_recurrences": 3, "vllm_xargs": {"num_recurrences": 3}}) == {"num_recurrences": 3}


@pytest.mark.parametrize("place", ["body", "vllm_xargs"])
@pytest.mark.parametrize(
    "name",
    [
        "num_recurrence",
        "exit_rules",
        "exit_treshold",
        "min_recurrence",
        "promptexit",
        "Num_Recurrences",
        "depth",
        "loops",
        "n_loops",
        "num_steps",
        "numLoops",
        "recurrences",
        "number_of_recursions",
    ],
)
def test_a_name_that_nearly_fits_is_no_option_that_does_nothing(place, name):
    body = {name: 1} if place == "body" else {"vllm_xargs": {name: 1}}
    with pytest.raises(FieldError, match="did you mean") as caught:
        take_fields(body, known={"prompt"})
    assert caught.value.field == name
    if place == "body":
        take_fields({name: 1}, known={name})  # the server's own


@pytest.mark.parametrize("name", ["steps", "n", "top_k", "iterations", "max_depth", "recurrent", "loop_id"])
def test_other_unknown_names_are_left_to_the_server(name):
    assert take_fields({name: 1, "extra_body": {name: 1}, "sampling_params": {name: 1}}) == {}


@pytest.mark.parametrize("path", ["extra_body", "extra_args", "sampling_params", "sampling_params.extra_args",
                                  "extra_body.vllm_xargs"])  # fmt: skip
def test_a_field_in_an_object_that_nothing_reads_is_named(path):
    """As users of Python clients write them in raw HTTP by mistake."""

    def body(fields: dict) -> dict:
        for name in reversed(path.split(".")):
            fields = {name: fields}
        return {"prompt": "a", **fields}

    for name, value in {"num_recurrences": 3, "exit_rule": "cosine", "diffusion": {}}.items():
        with pytest.raises(FieldError, match="top level of the body, or in its vllm_xargs") as caught:
            take_fields(body({name: value}))
        assert caught.value.field == name
        assert repr(path.rpartition(".")[2]) in str(caught.value)
    for name in ("num_recurrence", "n_loops"):
        with pytest.raises(FieldError, match="did you mean 'num_recurrences'") as caught:
            take_fields(body({name: 3}))
        assert caught.value.field == name
    assert take_fields(body({"num_recurrences": None, "top_k": 3, "depth": 1}), known={"depth"}) == {}
    take_fields({path: 3})


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ('{"num_recurrences": 2, "num_recurrences": 4}', "num_recurrences", "num_recurrences stands twice"),
        ('{"exit_rule": null, "exit_rule": "kl"}', "exit_rule", "exit_rule stands twice"),
        ('{"vllm_xargs": {"max_in_flight": 2, "max_in_flight": 2}}', "max_in_flight", "max_in_flight stands twice"),
        ('{"vllm_xargs": {"max_in_flight": 2}, "vllm_xargs": {}}', "vllm_xargs", "vllm_xargs stands twice"),
        ('{"diffusion": {"inner": 2, "inner": 4}}', "diffusion", "diffusion.inner stands twice"),
    ],
)
def test_a_key_that_stands_twice_is_named(body, field, said):
    with pytest.raises(FieldError, match=said) as caught:
        take_fields(parse_body(body.encode()))
    assert caught.value.field == field


def test_other_keys_may_stand_twice():
    body = parse_body(
        b'{"prompt": "a", "prompt": "b", "tools": [{"max_in_flight": 1, "max_in_flight": 2}], "max_in_flight": 3}'
    )
    assert take_fields(body) == {"max_in_flight": 3}
    assert body == {"prompt": "b", "tools": [{"max_in_flight": 2}]}
    assert json.loads(json.dumps(body)) == body
    with pytest.raises(ValueError):
        parse_body(b"{")


@pytest.mark.parametrize("name", ["kv_policy", "max_recurrences"])
def test_what_the_server_is_started_with_is_no_option_of_a_request(name):
    with pytest.raises(FieldError, match=f"loopwise serve MODEL {name}=...") as caught:
        take_fields({name: 1})
    assert caught.value.field == name
    take_fields({name: 1}, known={name})


@pytest.mark.parametrize("flag", [True, 1])
def test_extra_arguments_are_checked_as_a_body_is_and_twice(flag):
    """Over HTTP, they are what `check` has made of a body; a flag is then an integer."""
    given = {"exit_rule": "cosine", "exit_threshold": 0.2, "prompt_exit": flag, "someone_elses": "x"}
    validate_params(SimpleNamespace(extra_args=given), LANES)
    validate_params(SimpleNamespace(extra_args=None), LANES)
    for wrong in ({"exit_threshold": "0.2"}, {"exit_threshold": None}, {"prompt_exit": 1.0}, {"exit_treshold": 0.2}):
        with pytest.raises(FieldError) as caught:
            validate_params(SimpleNamespace(extra_args={"exit_rule": "cosine"} | wrong), LANES)
        assert caught.value.field == next(iter(wrong))


TEXT = st.text("adefix-", max_size=5) | st.sampled_from(RULES)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.sampled_from([LANES, FIXED]))
def test_anything_at_all_is_either_checked_or_refused_by_name(values, limits):
    error = checked = None
    try:
        checked = validate_fields(copy.deepcopy(values), limits)
    except FieldError as refused:
        error = refused
    if error is not None:
        assert error.field in values
        assert error.field in str(error)
    else:
        assert set(checked or {}) <= set(values)
        assert all(not isinstance(value, bool) for value in (checked or {}).values())
