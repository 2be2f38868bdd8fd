"""vLLM's lane engine: every request's greedy tokens and depths are those that it has alone, on transformers' layers.

Requests of random prompts, depths, rules and arrival share an engine of six rows and too few KV blocks; some are
aborted, many preempted. The oracle is tests/helpers/oracle.py: one request, one position at a time.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loopwise.serve import Params
from loopwise.serve.api.lanes import LaneConfig
from loopwise.serve.engine.diffusion_settings import DiffusionSettings
from tests.helpers.oracle import Answer, Oracle
from tests.helpers.repository import ROOT
from tests.helpers.serve_tiny import (
    BIASED,
    GROUPED,
    HUGINN,
    MIXED,
    NORMS,
    ON_TWO_CORES,
    OTHERS,
    OWN,
    RECURSIVE,
    RELAXED,
    REQUIRED,
    RETROFIT,
    SANDWICH,
    SCHEDULING,
    TWO_RANKS,
    WIDE,
    cases_run,
    generate,
    run_cases,
    save,
    source_config,
)

pytestmark = [
    pytest.mark.xdist_group("vllm"),  # one engine at a time
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

NEAR = 1e-4  # kernels round differently: answers that come closer to a tie are dropped, at most one in ten
CALM = {**GROUPED, "initializer_range": 0.12}
WINDOWS = {**CALM, **MIXED}
CALM_WIDE = {**WIDE, "initializer_range": 0.12}
OURO = {**RECURSIVE, "recurrence_norm": "between", "exit_gate": True}
OWN_GATE = {"exit_gate": True, "exit_gate_norm": "own"}
PARCAE = {**RETROFIT, "injection": "diagonal", "prelude_norm": True, "state_projection": True, "state_init": "zeros"}
TOKENS = {**CALM, "hidden_act": "relu2", "qk_norm": True, "value_embeddings": [False, True] * 3}
TIMES = {"scale": ["input_layernorm", "post_attention_layernorm"], "gate": ["self_attn.o_proj", "mlp.down_proj"]}
LOOPFORMER = {**RECURSIVE, "injection": "none", "time_conditioning": TIMES}
LEARNED = {**CALM, "hidden_act": "gelu", "learned_positions": True, "norm_weights": False, "attention_bias": True}
EXPERT = {"kind": "expert", "thresholds": [0.35, 0.5, 0.5, 0.5], "alpha": 0.7}
STEPS = {**EXPERT, "update": "step", "alpha": 1.3, "kv": "first-recursion"}
TOKEN = {"kind": "token", "gate": "sigmoid", "network": "mlp"}
ROUTED = {**RETROFIT, "injection": "none", "num_recurrences": 4, "max_recurrences": 4}
CHEAP = ("fixed", "trace", "latent-diff", "cosine")
THRESHOLDS = {"latent-diff": 0.7, "cosine": 0.3, "entropy-diff": 0.1, "kl": 0.3, "minp-kl": 0.3, "gate": 0.6}
FEW_BLOCKS = {"num_gpu_blocks_override": 9}
# Methods of vLLM's worker that reach the runner. The first makes all weights zero.
CALLS = [["reset_weights"], ["reload_weights"], ["reset_mm_cache"], ["reset_encoder_cache"], ["get_draft_model"]]
CALLS += [["update_config", {"load_config": {"use_tqdm_on_load": False}}], ["get_supported_tasks"], ["check_health"]]
PREEMPT = [3, 5, 8, 13, 21]  # steps at which all that run are preempted, beside those that lack blocks


@dataclass
class Case:
    model_type: str = "llama"
    policy: str = "per-depth"
    shape: dict[str, Any] = field(default_factory=lambda: RETROFIT)
    source: dict[str, Any] = field(default_factory=lambda: CALM)
    count: int = 16
    rules: tuple[str, ...] = CHEAP
    decoders: tuple[str, ...] = ("plain",)
    seed: int = 0
    engine: dict[str, Any] = field(default_factory=lambda: FEW_BLOCKS)
    lanes: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    rounds: int = 1
    inside: dict[str, Any] = field(default_factory=dict)  # further keys of a case of run_lanes.py
    program: str = "run_lanes.py"


WHOLE_PROMPTS = {**FEW_BLOCKS, "enable_chunked_prefill": False, "enable_prefix_caching": False}
WHOLE_PROMPTS |= {"max_num_batched_tokens": 128}
MANY_AT_ONCE = {**FEW_BLOCKS, "max_num_batched_tokens": 160}  # prompts that pass on their own, in relaxed models
RANKS = {"engine": {**MANY_AT_ONCE, **TWO_RANKS}, "environment": ON_TWO_CORES}
ALL = ("plain", "plain", "wave", "wave", "diffusion")
POLICIES = ("per-depth", "last-exited")
SEEDS = {f"seed-{n}": Case(policy=POLICIES[n % 2], count=64, seed=100 + n, decoders=ALL) for n in range(20)}
# Every architecture with few requests: the other cases have the rest.
ARCHITECTURES = {
    f"architecture-{name}": Case(
        name, "last-exited", source={**fields, "initializer_range": 0.12}, count=6, decoders=("plain", "wave")
    )
    for name, fields in {**REQUIRED, **OTHERS}.items()
}
# The offline engine, or another case, has fast tests of these.
BETWEEN = {
    "gemma": Case("gemma3_text", source={**WINDOWS, "query_pre_attn_scalar": 48}),
    "huginn": Case("sandwich", "last-exited", {**RETROFIT, "recurrence_norm": "last"}, {**HUGINN, **CALM}),
    "first": Case(policy="first"),
    "rules-that-read-logits": Case(
        policy="last-exited", rules=("entropy-diff", "kl", "minp-kl", "argmax-stability"), lanes={"passes_per_step": 5}
    ),
    "narrow": Case(policy="last-exited", lanes={"max_lanes": 3, "passes_per_step": 40}, decoders=ALL),
    "compiled": Case(
        "gemma3_text",
        shape={**RETROFIT, "relaxation": {**OWN, "own": [*NORMS, "self_attn.q_norm.weight"]}},
        policy="last-exited",
        engine=MANY_AT_ONCE,
        lanes={"compile": True},
        decoders=("plain", "wave"),
    ),
    "damped": Case(
        policy="last-exited", shape={**RETROFIT, "recurrence_damping": "1/R"}, lanes={"compile": True}, decoders=ALL
    ),
    "damped-learned": Case(
        shape={**RECURSIVE, "recurrence_damping": "learned", "recurrence_norm": "each"}, lanes={"compile": True}
    ),
    "nanbeige": Case(shape={**RECURSIVE, "recurrence_norm": "between"}, decoders=("plain", "wave"), count=6),
    "loopus": Case(
        "qwen3",
        "last-exited",
        {**RETROFIT, "injection": "none", "recurrence_damping": "selective", **OWN_GATE},
        rules=("gate", "fixed", "trace"),
        decoders=("plain", "wave"),
        lanes={"compile": True},
        count=8,
    ),
    "parcae": Case("ungated", "last-exited", PARCAE, TOKENS, decoders=("plain", "wave"), count=8),
    "loopformer": Case("ungated", "last-exited", LOOPFORMER, LEARNED, decoders=("plain", "wave"), count=8),
    "expert-choice-steps": Case(shape={**ROUTED, "router": STEPS}),
    "single": Case(policy="single", engine=WHOLE_PROMPTS, decoders=("plain", "diffusion")),
    # test_lane_features.py has a fast test of graph ticks: Triton's interpreter takes minutes for these.
    "graph-ticks": Case(policy="last-exited", count=6, program="run_graph_tick.py"),
    "graph-ticks-compiled": Case(
        "gemma3_text",
        "single",
        source=WINDOWS,
        count=4,
        program="run_graph_tick.py",
        engine=WHOLE_PROMPTS,
        lanes={"max_lanes": 3, "compile": True},
    ),
    "graph-ticks-routed": Case(
        shape={**ROUTED, "router": EXPERT},
        engine={**FEW_BLOCKS, "enable_prefix_caching": False},
        count=4,
        program="run_graph_tick.py",
    ),
    "graph-ticks-rotated-in-part": Case("glm4", "last-exited", count=4, program="run_graph_tick.py"),
    "modulo": Case(policy="modulo-2", engine=WHOLE_PROMPTS, decoders=("plain", "diffusion")),
    "batched-codas": Case(
        policy="last-exited", lanes={"coda_wait": 3, "passes_per_step": 6, "budget": 9}, decoders=ALL
    ),
    "narrow-plain": Case(policy="last-exited", lanes={"max_lanes": 3, "coda_wait": -1, "compile": True}),
    "last-exited": Case(policy="last-exited", count=40, seed=2, decoders=ALL),
    "transformers-backend": Case(
        "smollm3", source={**CALM, "no_rope_layers": [1, 0, 1, 1, 0, 1]}, policy="last-exited"
    ),
    "scheduling": Case(policy="last-exited", engine={**FEW_BLOCKS, **SCHEDULING}, decoders=("plain", "wave")),
    "token-choice": Case(shape={**ROUTED, "router": {**TOKEN, "kv": "first-recursion"}}),
}
LOGITS = ("entropy-diff", "kl", "minp-kl", "argmax-stability")  # which cannot end prompt tokens with a coda
CASES = {
    "per-depth": Case(count=24, seed=1, decoders=ALL),
    "relaxed": Case(shape=RELAXED, decoders=("wave",), engine=MANY_AT_ONCE),
    "ouro": Case("sandwich", "per-depth", OURO, {**SANDWICH, **CALM}, rules=("gate", "fixed", "trace")),
    "expert-choice": Case(shape={**ROUTED, "router": EXPERT}, engine={**FEW_BLOCKS, "enable_prefix_caching": False}),
    # As a configuration for vLLM's second model runner, with blocks that attention's kernels cannot have.
    "worker": Case(
        policy="last-exited",
        engine={"num_gpu_blocks_override": 5, "block_size": 64},
        decoders=ALL,
        rounds=2,
        inside={"resumed_as_new": True, "kernel_block": 32, "calls": CALLS},
    ),
    "two-ranks": Case("qwen2", "last-exited", BIASED, CALM_WIDE, **RANKS, decoders=("plain", "wave")),
}
SLOW = {**SEEDS, **ARCHITECTURES, **BETWEEN}
SLOW |= {
    f"{name}-compiled": replace(case, lanes={**case.lanes, "compile": True})
    for name, case in {**CASES, **BETWEEN}.items()
    if name in ("huginn", "ouro", "narrow", "two-ranks")
}


def threshold_of(rule: str, factor: float) -> float | None:
    if rule == "argmax-stability":
        return 1.0
    return THRESHOLDS[rule] * factor if rule in THRESHOLDS else None


def requests(case: Case, seed: int) -> tuple[list[list[int]], list[Params], list[dict[str, int]]]:
    """Prompts, what is asked of each, and when each comes and is aborted."""
    draw, flight = random.Random(seed), random.Random(seed)
    common = [draw.randrange(256) for _ in range(70)]  # so that prompts share blocks
    prompts, params, times = [], [], []
    for _ in range(case.count):
        length = draw.choice((1, 3, 9, 17, 33, 40, 70, 90))
        shared = draw.choice((0, min(length, 70)))
        prompts.append(common[:shared] + [draw.randrange(256) for _ in range(length - shared)])
        rule, limit, tokens = draw.choice(case.rules), draw.choice((1, 2, 3, 4, 4, 4, 6)), draw.randint(1, 24)
        params.append(
            Params(
                max_tokens=tokens,
                num_recurrences=limit,
                min_recurrences=draw.randint(1, limit),
                exit_rule="fixed" if rule == "trace" else rule,
                exit_threshold=threshold_of(rule, draw.uniform(0.5, 1.5)),
                prompt_exit=case.policy != "per-depth" and rule not in LOGITS and draw.random() < 0.3,
                trace=tuple(draw.randint(1, limit) for _ in range(length + tokens)) if rule == "trace" else (),
                ignore_eos=True,
            )
        )
        arrive = draw.randrange(case.count // 2)
        params[-1] = in_flight(params[-1], case.decoders, flight)
        if "router" in case.shape:
            params[-1] = Params(tokens, 4, 1, "fixed", 0.0, ignore_eos=True)
        times.append({"arrive": arrive, "abort": arrive + draw.randint(1, 6) if draw.random() < 0.15 else -1})
    return prompts, params, times


def in_flight(params: Params, decoders: tuple[str, ...], draw: random.Random) -> Params:
    """`params` with a decoder."""
    decoder, in_flight = draw.choice(decoders), draw.randint(2, 8)
    if decoder != "diffusion":
        return replace(params, decoder=decoder, max_in_flight=in_flight)
    limit: Any = params.num_recurrences
    freeze = draw.choice(("latent-diff", "acceleration", "token-stability", "fixed"))
    diffusion = DiffusionSettings(
        inner=draw.randint(1, limit),
        headway=draw.randint(1, 2),
        ema=draw.choice((0.0, 0.1)),
        freeze=freeze,
        threshold=draw.uniform(0.3, 0.9),
        continuous=draw.random() < 0.3,
    )
    depth = {"exit_rule": "fixed", "exit_threshold": None, "min_recurrences": None, "prompt_exit": False, "trace": ()}
    return replace(params, decoder=decoder, max_in_flight=in_flight, diffusion=diffusion, **depth)


def alone(oracle: Oracle, prompt: list[int], params: Params) -> Answer:
    if oracle.config.router:
        got = generate(oracle.model, prompt, 4, params.max_tokens)
        return Answer(tokens=got.tokens, margin=got.gap)
    return (
        oracle.diffuse(prompt, params, int(params.max_in_flight))
        if params.decoder == "diffusion"
        else oracle.generate(prompt, params)
    )


def sampling(params: Params) -> dict[str, Any]:
    """vLLM's, with the extra arguments that go together."""
    arguments: dict[str, Any] = {"num_recurrences": params.num_recurrences, "decoder": params.decoder}
    if params.decoder != "plain":
        arguments["max_in_flight"] = params.max_in_flight
    if params.decoder == "diffusion":
        arguments["diffusion"] = asdict(params.diffusion)
        del arguments["diffusion"]["max_in_flight"]
    elif params.trace:
        arguments["trace"] = list(params.trace)
    else:
        arguments |= {"exit_rule": params.exit_rule}
        if params.prompt_exit:
            arguments["prompt_exit"] = True
        if params.min_recurrences and params.min_recurrences > 1:
            arguments["min_recurrences"] = params.min_recurrences
        if params.exit_rule != "fixed":
            arguments["exit_threshold"] = params.exit_threshold
    return {"temperature": 0, "max_tokens": params.max_tokens, "ignore_eos": True, "extra_args": arguments}


STREAMS = """
import torch
import vllm.platforms
from vllm.platforms.interface import Platform, PlatformEnum


class Gpu(Platform):
    _enum = PlatformEnum.OOT
    device_name = device_type = "cuda"

    @classmethod
    def import_kernels(cls):
        pass  # the CPU wheel has kernels of this name for AVX-512 alone


vllm.platforms._current_platform = Gpu()
before = torch.cuda.Event, torch.cuda.Stream, torch.accelerator.synchronize
from loopwise.serve.vllm import worker

assert worker.LaneWorker is worker.GpuLaneWorker
assert before == (torch.cuda.Event, torch.cuda.Stream, torch.accelerator.synchronize)
"""


@pytest.mark.slow
def test_the_worker_of_a_gpu_leaves_torch_its_streams():
    """vLLM's worker for CPUs replaces them when it is imported: no CUDA graph could be recorded then."""
    settings = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", STREAMS]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "shape", [{"compile": True}, {"relaxation": {"rank": 2}}, {"time_conditioning": {"scale": []}}]
)
def test_no_step_goes_on_with_old_weights(shape):
    """Reloading is refused where something was made of them when the engine started."""
    from loopwise.serve.vllm.runner import LaneRunner

    config = SimpleNamespace(**{"relaxation": None, "time_conditioning": None} | shape)
    lanes, device = LaneConfig(compile=shape.get("compile", False)), torch.device("cpu")
    runner: Any = SimpleNamespace(model=SimpleNamespace(config=config), lanes=lanes, device=device)
    with pytest.raises(ValueError, match="reload_weights: "):
        LaneRunner.reload_weights(runner)


def test_no_runner_of_vllms_is_behind_lanes():
    from loopwise.serve.vllm.runner import LaneRunner

    assert LaneRunner.__bases__ == (object,)
    theirs = ("gpu_model_runner", "cpu_model_runner", "gpu_input_batch", "V2_MODEL_RUNNER")
    texts = {path: path.read_text() for path in (ROOT / "serve").rglob("*.py")}
    assert len(texts) > 50
    assert [(path, name) for path, text in texts.items() for name in theirs if name in text] == []


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory) -> dict[str, tuple[list[Answer], list[dict], dict]]:
    """name -> (the oracle's answers, when requests come and go, what vLLM gave), for the cases that are tested."""
    folder = tmp_path_factory.mktemp("lanes")
    wanted: dict[str, tuple[list[Answer], list[dict]]] = {}
    work: dict[str, dict[str, dict]] = {}  # by program, by name
    for name, case in cases_run(request, CASES | SLOW).items():
        shape = {"num_recurrences": 4, "max_recurrences": 6, "kv_policy": case.policy, **case.shape}
        model = save(folder / name, source_config(case.model_type, **case.source), **shape)
        prompts, params, times = requests(case, case.seed)
        oracle = Oracle(model)
        wanted[name] = [alone(oracle, p, q) for p, q in zip(prompts, params, strict=True)], times
        asked = [{"prompt": p, "sampling": sampling(q), **t} for p, q, t in zip(prompts, params, times, strict=True)]
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "0", **case.environment}
        task = {"folder": str(folder / name), "engine": case.engine, "lanes": {"passes_per_step": 8, **case.lanes}}
        task |= {"requests": asked, "environment": environment, "rounds": case.rounds, "preempt": PREEMPT} | case.inside
        work.setdefault(case.program, {})[name] = task
    return {
        name: (*wanted[name], result)
        for program, tasks in work.items()
        for name, result in zip(tasks, run_cases(list(tasks.values()), folder, program), strict=True)
    }


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_equals_every_request_alone(name, answers):
    wanted, times, result = answers[name]
    assert "error" not in result, result["error"]
    clear = [n for n, answer in enumerate(wanted) if answer.margin > NEAR]
    assert len(clear) >= 0.9 * len(wanted), f"near-ties in {len(wanted) - len(clear)} of {len(wanted)} requests"
    for got in result["rounds"]:
        done = [n for n in clear if got[n] is not None]
        print(
            f"{name}: {len(done)} equal, {len(wanted) - len(clear)} near-ties, {result['preemptions']} preemptions, "
            f"{result['prefix_hits']} prefix hits"
        )
        assert all(times[n]["abort"] >= 0 for n in range(len(wanted)) if got[n] is None)
        assert [got[n]["tokens"] for n in done] == [wanted[n].tokens for n in done]
        plain = [n for n in done if len(wanted[n].depths) == len(wanted[n].tokens)]  # a diffusion's oracle has none
        assert [got[n]["depths"] for n in plain] == [wanted[n].depths for n in plain]
    assert result["held"] == {"blocks": 0, "requests": 0}
    assert result["preemptions"] > 0
    assert result.get("graph_ticks", 1) > 0 or "routed" in name  # a router's choices are the host's
    assert {*result.get("rotated", [])} <= {"routed" not in name}  # by the kernels, in every layer or in none
