"""vLLM's greedy tokens, and their log-probabilities, are those of transformers `generate`, in fp32.

Covered, in part slowly: Llama, Qwen3, Mistral and Gemma3, each at R = 1, 3 and 4 (1 and 4: prelude, core, coda, a
random linear injection; 3: a core alone); every state init and injection; every other architecture of the table at
R = 3; two tensor-parallel ranks; the graph that torch.compile traces. Windows are 8 tokens, mixed types follow the
source layers' ids. Each engine answers the same 8 prompts twice, the second time from its prefix cache; long prompts
are chunked.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from loopwise.serve.api.architectures import ARCHITECTURES
from tests.helpers.serve_tiny import (
    BIASED,
    GROUPED,
    HUGINN,
    ON_TWO_CORES,
    OTHERS,
    RECURSIVE,
    RELAXED,
    REQUIRED,
    RETROFIT,
    SANDWICH,
    SCHEDULING,
    TWO_RANKS,
    Answer,
    cases_run,
    generate,
    prompts,
    run_cases,
    save,
    source_config,
)

pytestmark = [
    pytest.mark.xdist_group("vllm"),  # one engine at a time
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

TOKENS = 12
TIE = 1e-4  # kernels round differently: prompts that come closer to a tie are dropped, at most one in ten
TRACED = {"enforce_eager": False}, {"VLLM_CPU_CI_ENV": "1"}  # Dynamo, no inductor
NORMAL = {**RETROFIT, "state_init": "normal", "state_std": 0.7, "state_seed": 5}

SOME = ("gpt_neox", "olmo2", "qwen2", "ungated")  # of OTHERS, which differ most from Llama


@dataclass
class Case:
    model_type: str
    num_recurrences: int = 3
    shape: dict[str, Any] = field(default_factory=lambda: RETROFIT)
    engine: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] | None = None


CASES = {
    "llama-retrofit-1": Case("llama", 1),
    **{f"{t}-recursive-3": Case(t, 3, RECURSIVE) for t in REQUIRED},
    **{f"{t}-retrofit-4": Case(t, 4) for t in ("llama", "gemma3_text")},
    "traced": Case("gemma3_text", 2, NORMAL, *TRACED),
    **{t: Case(t) for t in SOME},
    "input-gated": Case("llama", shape={**RETROFIT, "injection": "gated", "exit_gate": True}),
    "sequence": Case("llama", shape={**RETROFIT, "injection": "none", "sharing": "sequence"}),
    "damped-learned": Case("qwen3", 3, {**RECURSIVE, "recurrence_damping": "learned", "recurrence_norm": "each"}),
    "relaxed": Case("llama", 4, RELAXED),
    "loopus": Case("qwen3", 3, {**RETROFIT, "injection": "none", "recurrence_damping": "selective"}),
    "parcae": Case("ungated", 3, {**NORMAL, "injection": "diagonal", "prelude_norm": True, "state_projection": True}),
    "huginn": Case("sandwich", 4, {**NORMAL, "recurrence_norm": "last"}, source=HUGINN),
    "ouro": Case("sandwich", 4, {**RECURSIVE, "recurrence_norm": "between", "exit_gate": True}, source=SANDWICH),
}
SLOW = {
    **{f"{t}-retrofit-4": Case(t, 4) for t in REQUIRED if t not in ("llama", "gemma3_text")},
    **{t: Case(t) for t in OTHERS if t not in SOME},
    "normal-linear": Case("llama", shape=NORMAL),
    "input-add": Case("llama", shape={**RECURSIVE, "injection": "add"}),
    "input-none": Case("llama", shape={**RETROFIT, "injection": "none"}),
    "scheduling": Case("llama", engine=SCHEDULING),
    "norm-each": Case("llama", shape={**NORMAL, "recurrence_norm": "each"}),
    "zeros-linear": Case("llama", shape={**RETROFIT, "state_init": "zeros"}),
    "normal-add": Case("llama", shape={**NORMAL, "injection": "add"}),
    "damped": Case("llama", 4, {**NORMAL, "recurrence_damping": "1/R"}),
    "input-decayed": Case("llama", shape={**RETROFIT, "injection": "decayed"}),
    "relaxed-gemma": Case("gemma3_text", 3, RELAXED),
    "relaxed-biased": Case("qwen2", 3, BIASED),
    "two-ranks": Case("llama", 3, NORMAL, TWO_RANKS, ON_TWO_CORES),
    **{f"{t}-retrofit-1": Case(t, 1) for t in REQUIRED if t != "llama"},
    **{f"norm-{place}": Case("llama", shape={**NORMAL, "recurrence_norm": place}) for place in ("between", "last")},
    "traced-relaxed": Case("llama", 3, RELAXED, *TRACED),
    "traced-damped": Case("llama", 4, {**NORMAL, "recurrence_damping": "1/R"}, *TRACED),
    "traced-parcae": replace(CASES["parcae"], engine=TRACED[0], environment=TRACED[1]),
    "two-ranks-relaxed": Case("qwen2", 3, BIASED, TWO_RANKS, ON_TWO_CORES),
}

# With biases that vLLM lacks: its Qwen3 has them in some of its projections, its Gemma in none.
BIASED_TYPES = {f"biased-{t}": Case(t, source={**GROUPED, "attention_bias": True}) for t in ("qwen3", "gemma")}

SLOW_TYPES = {t: pytest.mark.slow for t in REQUIRED if f"{t}-retrofit-1" in SLOW}  # at more than one depth


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory) -> dict[str, tuple[list[Answer], dict]]:
    """name -> (transformers' answers to the prompts, vLLM's), for the cases that this session tests."""
    cases = cases_run(request, CASES | SLOW | BIASED_TYPES)
    folder = tmp_path_factory.mktemp("engines")
    wanted, work = {}, []
    for name, case in cases.items():
        source = source_config(case.model_type, **(case.source or (REQUIRED | OTHERS)[case.model_type]))
        model = save(folder / name, source, **case.shape)
        wanted[name] = [generate(model, prompt, case.num_recurrences, TOKENS) for prompt in prompts()]
        engine = {"hf_overrides": {"num_recurrences": case.num_recurrences}, **case.engine}
        work.append({"folder": str(folder / name), "prompts": prompts(), "tokens": TOKENS, "engine": engine})
        work[-1]["environment"] = {"VLLM_CPU_CI_ENV": "0", "VLLM_CPU_OMP_THREADS_BIND": "0", **case.environment}
    return {
        name: (wanted[name], result)
        for name, result in zip(cases, run_cases(work, folder, "run_engines.py"), strict=True)
    }


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_equals_transformers(name, answers):
    wanted, result = answers[name]
    assert "error" not in result, result["error"]
    clear = [i for i, answer in enumerate(wanted) if answer.gap >= TIE]
    assert len(clear) >= 7, f"near-ties in {8 - len(clear)} of 8 prompts"
    for got in result["rounds"]:
        assert [got[i]["tokens"] for i in clear] == [wanted[i].tokens for i in clear]
        pairs = [zip(got[i]["logprobs"], wanted[i].logprobs, strict=True) for i in clear]
        error = max(abs(a - b) for pair in pairs for a, b in pair)
        print(f"{name}: {len(clear)} prompts equal, max |dlogprob| {error:.1e}")
        assert error < 1e-3
    assert result["prefix_hits"] > 0


@pytest.mark.parametrize("name", ["biased-qwen3", pytest.param("biased-gemma", marks=pytest.mark.slow)])
def test_tensors_that_vllm_ignores_are_refused(name, answers):
    """It loads checkpoints with more tensors than it has, and drops those that it lacks."""
    said = answers[name][1]["error"]
    assert re.search(
        r"vLLM's implementation of this architecture ignores coda.0.self_attn.\w_proj.bias, .* and \d+ more", said
    )


def test_near_ties_are_few(answers):
    gaps = [answer.gap for wanted, _ in answers.values() for answer in wanted]
    dropped = sum(gap < TIE for gap in gaps)
    print(f"dropped for near-ties: {dropped} of {len(gaps)} prompts")
    assert dropped <= len(gaps) / 10


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=SLOW_TYPES.get(t, ())) for t in REQUIRED])
def test_depth_adds_caches_but_no_weights_and_matters(model_type, answers):
    """Did it not matter, the comparisons above could not tell one depth from another."""
    if f"{model_type}-retrofit-1" not in answers or f"{model_type}-retrofit-4" not in answers:
        pytest.skip("needs both depths")
    shallow, deep = answers[f"{model_type}-retrofit-1"], answers[f"{model_type}-retrofit-4"]
    assert sum(a.tokens != b.tokens for a, b in zip(shallow[0], deep[0], strict=True)) >= 5
    assert shallow[1]["parameters"] == deep[1]["parameters"]
    assert (shallow[1]["caches"], deep[1]["caches"]) == (3 + 2, 3 + 4 * 2)


def test_every_architecture_is_compared():
    assert set(ARCHITECTURES) == {case.model_type for case in (CASES | SLOW).values()}
