"""vLLM's sampling parameters in the lane engine, where a step gives a request several tokens.

One engine runs all requests at once, twice, the second time in the opposite order: neighbours must not matter.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.serve import Engine, Params
from loopwise.serve.api.lanes import LaneConfig
from loopwise.serve.vllm.validation import install_validation
from tests.helpers import processors
from tests.helpers.serve_tiny import GROUPED, RETROFIT, prompts, run_cases, save, source_config, tokenizer

pytestmark = [
    pytest.mark.xdist_group("vllm"),  # one engine at a time
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

PROMPT = prompts()[4]
TRACE = [4] * len(PROMPT) + [1, 3, 2, 4, 1, 1, 2] * 8
RANDOM = {"temperature": 0.9, "seed": 11, "top_p": 0.9, "top_k": 40, "min_p": 0.01}
DIGITS = list(range(48, 58))
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs": {"logprobs": 3},
    "all-logprobs": {"logprobs": -1},
    "logprobs-of-tokens": {"logprob_token_ids": [65, 66]},
    "logprobs-of-a-wave": {"logprobs": 2, "extra_args": {"trace": TRACE, "decoder": "wave", "max_in_flight": 4}},
    "logprobs-of-a-bias": {"logprobs": 2, "logit_bias": {"65": 1e-6}},  # sampled by vLLM's sampler
    "prompt-logprobs": {"prompt_logprobs": 2},
    "prompt-logprobs-of-one-token": {"prompt_logprobs": 2, "prompt": [65]},
    "seeded": RANDOM,
    "seeded-again": RANDOM,
    "other-seed": {**RANDOM, "seed": 12},
    "unseeded": {"temperature": 1.0},
    "repetition": {"repetition_penalty": 1e6},
    "bias": {"logit_bias": {str(token): 100.0 for token in (65, 66)}},
    "allowed": {"allowed_token_ids": DIGITS},
    "bad-words": {"bad_words": ["a", "b"]},
    "regex": {"structured_outputs": {"regex": "[0-9]{3}-[a-f]{4}"}, "ignore_eos": False},
    "choice": {"structured_outputs": {"choice": ["yes", "no"]}, "ignore_eos": False},
    "max-tokens": {"max_tokens": 7},
}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a threshold of another type": ({"exit_rule": "cosine", "exit_threshold": "0.1"}, "exit_threshold='0.1': a finite"),
    "a threshold out of range": ({"exit_rule": "cosine", "exit_threshold": -1.0}, "exit_threshold=-1.0: at least 0"),
    "a threshold of no rule": ({"exit_threshold": 0.1}, "exit_rule='fixed' has no threshold"),
    "no such rule": ({"exit_rule": "cosin"}, "did you mean 'cosine'?"),
    "too deep": ({"num_recurrences": 99}, "num_recurrences=99: an integer from 1 to 8"),
    "none": ({"num_recurrences": None}, "num_recurrences=None: an integer"),
    "a trace of text": ({"trace": "4444"}, "trace='4444': a list"),
    "too wide": ({"decoder": "wave", "max_in_flight": 99}, "max_in_flight=99: an integer from 1 to 8"),
    "a misspelt field": ({"exit_treshold": 0.1}, "did you mean 'exit_threshold'?"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("features") / "tiny"
    shape = {**RETROFIT, "num_recurrences": 4, "kv_policy": "last-exited"}
    return folder, save(folder, source_config("llama", **GROUPED, initializer_range=0.12), **shape)


@pytest.fixture(scope="module")
def alone(model) -> Any:
    """Completions of the offline engine for sampling by `fields`, one request at a time."""
    engine = Engine(model[1], max_num_seqs=1, max_model_len=200)

    def generate(**fields: Any) -> list[int]:
        return engine.generate(
            [PROMPT], Params(**{"max_tokens": 40, "trace": tuple(TRACE), "ignore_eos": True} | fields)
        )[0].tokens

    return generate


@pytest.fixture(scope="module")
def greedy(alone) -> list[int]:
    return alone()


@pytest.fixture(scope="module")
def sampled(model, greedy) -> tuple[dict[str, Any], list[str]]:
    """A case of all requests, and their names."""
    stop = greedy[11]
    more = {
        "stop-id": {"stop_token_ids": [stop]},
        "many-stop-ids": {"stop_token_ids": [stop, *range(230, 256)]},
        "stop-string": {"stop": [bytes_of(greedy[9:11])]},
        "min-tokens": {"stop_token_ids": [stop], "min_tokens": 20},
    }
    asked = []
    for number, fields in enumerate((REQUESTS | more).values()):
        sampling = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "extra_args": {"trace": TRACE}} | fields
        prompt = sampling.pop("prompt", PROMPT)
        asked.append({"prompt": prompt, "sampling": sampling, "arrive": number, "abort": -1})
    case = {
        "folder": str(model[0]),
        "engine": {"max_model_len": 200, "max_logprobs": -1},
        "lanes": {"passes_per_step": 8},
        "requests": asked,
        "rounds": 2,
        "refused": [{"extra_args": fields} for fields, _ in BAD.values()],
    }
    case["environment"] = {"VLLM_CPU_OMP_THREADS_BIND": "0"}
    return case, [*REQUESTS, *more]


@pytest.fixture(scope="module")
def engines(model, sampled, own, turns) -> list[dict[str, Any]]:
    """Results of all engines of this file, which one process makes."""
    return run_cases([sampled[0], own, *turns[0]], model[0].parent, "run_lanes.py")


@pytest.fixture(scope="module")
def ran(engines, sampled) -> dict[str, Any]:
    """Results of all requests of one engine, the refused ones first."""
    assert "error" not in engines[0], engines[0]["error"]
    return engines[0] | {"names": sampled[1]}


@pytest.fixture(scope="module")
def results(ran) -> dict[str, list[dict]]:
    """name -> what both rounds gave."""
    return {name: [done[n] for done in ran["rounds"]] for n, name in enumerate(ran["names"])}


def bytes_of(tokens: list[int]) -> str:
    return str(tokenizer().decode(tokens))


def test_what_no_lane_can_have_is_a_value_error_and_ends_nothing(ran):
    for said, (name, (_, wanted)) in zip(ran["refused"], BAD.items(), strict=True):
        assert wanted in said, name


def test_neighbours_and_order_do_not_matter(results):
    for name, (first, second) in results.items():
        if name != "unseeded":
            assert first["tokens"] == second["tokens"], name


@pytest.mark.parametrize("name", ["greedy", "prompt-logprobs", "all-logprobs", "logprobs", "logprobs-of-a-wave"])
def test_greedy_tokens_are_the_same_whatever_is_reported(name, results, greedy):
    assert results[name][0]["tokens"] == greedy


def test_depths_are_the_trace(results):
    assert results["greedy"][0]["depths"] == TRACE[len(PROMPT) - 1 : len(PROMPT) + 39]


def test_log_probabilities_are_those_of_the_tokens(results, model):
    """At full depth in the prompt, transformers says the same; of generated tokens, the best has the most."""
    with torch.no_grad():
        logits = RecurrentDepthForCausalLM.from_pretrained(model[0])(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    want = logits[torch.arange(len(PROMPT) - 1), torch.tensor(PROMPT[1:])]
    assert results["prompt-logprobs"][0]["prompt_logprobs"] == pytest.approx(want.tolist(), abs=1e-3)
    assert results["logprobs"][0]["logprobs"][0] == pytest.approx(float(logits[-1].max()), abs=1e-3)
    assert len(results["logprobs"][0]["logprobs"]) == 40
    for name in ("all-logprobs", "logprobs-of-tokens", "logprobs-of-a-wave", "logprobs-of-a-bias"):
        assert results[name][0]["logprobs"] == pytest.approx(results["logprobs"][0]["logprobs"], abs=1e-3), name
    assert results["prompt-logprobs-of-one-token"][0]["prompt_logprobs"] == []
    assert len(results["prompt-logprobs-of-one-token"][0]["tokens"]) == 40


def test_seeded_sampling_is_that_of_a_plain_loop(results, alone, greedy):
    want = alone(**RANDOM)
    assert results["seeded"][0]["tokens"] == results["seeded-again"][0]["tokens"] == want != greedy
    assert results["other-seed"][0]["tokens"] == alone(**{**RANDOM, "seed": 12}) != want
    assert results["unseeded"][0]["tokens"] != results["unseeded"][1]["tokens"]


@pytest.mark.slow
def test_what_the_device_samples_is_the_same_in_ticks_of_a_fixed_width(model, alone, tmp_path):
    """Requests that come one after the other, so that rows of several kinds of sampling are in flight."""
    fields = [{}, RANDOM, {"temperature": 0.8, "seed": 5}, {**RANDOM, "seed": 12}]
    common = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, "extra_args": {"trace": TRACE}}
    asked = [{"prompt": PROMPT, "sampling": common | some, "arrive": n, "abort": -1} for n, some in enumerate(fields)]
    case = {
        "folder": str(model[0]),
        "engine": {"max_model_len": 200},
        "lanes": {"passes_per_step": 4},
        "requests": asked,
    }
    result = run_cases([case | {"environment": {"VLLM_CPU_OMP_THREADS_BIND": "0"}}], tmp_path, "run_graph_tick.py")[0]
    assert "error" not in result, result["error"]
    assert result["graph_ticks"] > 1
    assert set(result["rotated"]) == {True}
    assert [done["tokens"] for done in result["rounds"][0]] == [alone(max_tokens=5, **some) for some in fields]


def test_processors(results):
    new = results["repetition"][0]["tokens"]
    assert len({*new} - {*PROMPT}) == len(new) == 40
    assert set(results["bias"][0]["tokens"]) <= {65, 66}
    assert set(results["allowed"][0]["tokens"]) <= set(DIGITS)
    assert not set(results["bad-words"][0]["text"]) & {"a", "b"}


@pytest.fixture(scope="module")
def own(model) -> dict[str, Any]:
    """Requests of several depths that come and go, so that rows are sampled in turn, and change hands."""
    common = {"ignore_eos": True, "max_tokens": 5}
    sampling = [
        common | {"temperature": n % 2, "seed": 10 * n, "extra_args": {"num_recurrences": 1 + n % 4}} for n in range(9)
    ]
    asked = [{"prompt": PROMPT, "sampling": some, "arrive": n // 2, "abort": -1} for n, some in enumerate(sampling)]
    case = {"folder": str(model[0]), "engine": {"logits_processors": ["processors:Counts"]}, "requests": asked}
    case |= {"lanes": {"passes_per_step": 3}, "preempt": [3]}
    for one in sampling[1::3]:  # decoded plainly, as it may read earlier tokens
        one["extra_args"] |= {"decoder": "wave", "max_in_flight": 4}
    case["refused"] = [{"extra_args": {"decoder": "diffusion"}, "seed": 1}]
    return case | {"environment": {"VLLM_CPU_OMP_THREADS_BIND": "0"}}


def test_processors_of_a_users_own(engines):
    result = engines[1]
    assert "error" not in result, result["error"]
    assert [done["tokens"] for done in result["rounds"][0]] == [[10 * n + i for i in range(5)] for n in range(9)]
    assert "decoder='diffusion': logits processors" in result["refused"][0]
    assert result["preemptions"] > 0


BEGINNING = [(37 * n + n * n) % 256 for n in range(70)]


TURNS: dict[str, dict[str, Any]] = {  # KV policy -> fields of the requests
    "per-depth": {"exit_rule": "latent-diff", "exit_threshold": 1.0},
    "last-exited": {"exit_rule": "latent-diff", "exit_threshold": 1.0, "prompt_exit": True},
    "first": {"trace": [4] * 64 + [1, 3, 2] * 4},
}


@pytest.fixture(scope="module")
def turns(tmp_path_factory) -> tuple[list[dict[str, Any]], list[list[list[int]]]]:
    """Cases of prompts that share blocks, under each KV policy, and the tokens of each request."""
    folder = tmp_path_factory.mktemp("turns")
    cases, wanted = [], []
    for policy, fields in TURNS.items():
        shape = {**RETROFIT, "num_recurrences": 4, "kv_policy": policy}
        small = save(folder / policy, source_config("llama", **GROUPED, initializer_range=0.12), **shape)
        engine = Engine(small, max_num_seqs=1, max_model_len=200)

        def alone(prompt: list[int], count: int, engine: Engine = engine, fields: Any = fields) -> list[int]:
            return engine.generate([prompt], Params(count, 4, ignore_eos=True, **fields))[0].tokens

        if policy == "per-depth":
            turns = [(BEGINNING, 60, 0), ([*BEGINNING, *alone(BEGINNING, 60), 1, 2, 3], 9, 90)]
        else:
            turns = [([*BEGINNING[:64], tail], 9, 0) for tail in (7, 103, 119, 135, 151)]
        asked = []
        for prompt, count, arrive in turns:
            sampling = {"temperature": 0, "max_tokens": count, "ignore_eos": True, "extra_args": fields}
            asked.append({"prompt": prompt, "sampling": sampling, "arrive": arrive, "abort": -1})
        case = {"folder": str(folder / policy), "requests": asked, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0"}}
        cases.append(case | {"engine": {"max_model_len": 200, "max_num_batched_tokens": 2048}})
        wanted.append([alone(prompt, count) for prompt, count, _ in turns])
    return cases, wanted


def test_what_the_prefix_cache_holds_changes_no_token(engines, turns):
    """A coda's keys are those of the depth of an exit. A further turn of a chat has the answer in its prompt, and does
    not read them. Of prompts that begin alike and leave at their own depths, others wait for the coda of the first."""
    for result, want in zip(engines[2:], turns[1], strict=True):
        assert "error" not in result, result["error"]
        assert result["prefix_hits"] > 0
        assert [done["tokens"] for done in result["rounds"][0]] == want


def test_processors_are_of_one_kind_whichever_runner_a_configuration_is_for(monkeypatch):
    """Where Triton is, it is vLLM's second, which has processors of another kind."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    install_validation()
    monkeypatch.syspath_prepend(Path(processors.__file__).parent)
    fields = {"logits_processors": ["processors:Counts"], "runner_type": "generate"}
    made = SimpleNamespace(model_config=SimpleNamespace(hf_config=RecurrentDepthConfig(), **fields))
    made.vllm_config = SimpleNamespace(
        use_v2_model_runner=True, additional_config=LaneConfig().flags()["additional_config"]
    )
    build: Any = InputProcessor._build_logits_processors_params_validator
    validate = build(made)
    validate(SamplingParams(seed=0))
    with pytest.raises(VLLMValidationError, match="a seed is wanted"):
        validate(SamplingParams())
    made.vllm_config.additional_config = {}
    with pytest.raises(ValueError, match="Counts"):
        build(made)


def test_grammars(results):
    assert re.fullmatch("[0-9]{3}-[a-f]{4}", results["regex"][0]["text"])
    assert results["choice"][0]["text"] in ("yes", "no")


def test_stops(results, greedy):
    stop, text = greedy[11], bytes_of(greedy)
    first = greedy.index(stop) + 1
    assert results["stop-id"][0]["tokens"] == greedy[:first]
    assert results["stop-id"][0]["reason"] == "stop"
    many = next(n for n, token in enumerate(greedy) if token == stop or token >= 230) + 1
    assert results["many-stop-ids"][0]["tokens"] == greedy[:many]
    assert results["stop-string"][0]["text"] == text.split(bytes_of(greedy[9:11]))[0]
    least = results["min-tokens"][0]["tokens"]
    assert stop not in least[:20]
    assert len(least) >= 20
    assert results["max-tokens"][0]["tokens"] == greedy[:7]
    assert results["max-tokens"][0]["reason"] == "length"
