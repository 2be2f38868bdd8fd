"""Runs a lane engine of vLLM in which one of twelve requests meets an exception, again and again.

usage: run_faults.py CASES.json RESULTS.json      CASES: a list of {folder, engine, requests, environment, faults};
`faults` are names in FAULTS with the sampling parameters of request POISON. RESULTS: what came of each request without
a fault, and then with each, in the same engine; what the engine held at the end.
"""

import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from loopwise.serve.api.lanes import LaneConfig
from tests.helpers.run_engines import had, main

POISON = 7


def is_poison(name: str) -> bool:
    return name.split("-")[0] == str(POISON)


def fails(function: Callable, wrong: Callable, after: bool = False) -> Any:
    """`function`, which raises where `wrong` holds of its arguments: `after` its work, or before."""

    def call(*args: Any, **options: Any) -> Any:
        bad = bool(wrong(*args, **options))
        if bad and not after:
            raise ZeroDivisionError("poison")
        result = function(*args, **options)
        if bad:
            raise ZeroDivisionError("poison")
        return result

    return call


def faults(core: Any) -> dict[str, tuple[Any, str, Callable, bool]]:
    """name -> (the owner of a function, its name, when it raises, whether it does so after its work)."""
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    from loopwise.serve.engine import sampling, transitions
    from loopwise.serve.vllm import scheduler, steps
    from loopwise.serve.vllm.sampling import LaneSampler

    lanes = core.model_executor.driver_worker.worker.model_runner.steps
    marked = lambda given, *_: given.get("num_recurrences") == 3  # noqa: E731
    of_poison = lambda self, row, request, *_: is_poison(request.name)  # noqa: E731
    of_row = lambda r: is_poison(lanes.sampler.requests[int(r)].name)  # noqa: E731

    def of_grammar(grammar: Any, *_: Any) -> bool:
        of = [r for r in core.scheduler.requests.values() if is_poison(r.request_id)]
        return any(r.structured_output_request and r.structured_output_request.grammar is grammar for r in of)

    limit = lambda state, row, request, *_: request.max_tokens == 11  # noqa: E731
    drawn = lambda self, row, temperature, *_: temperature == 0.8125  # noqa: E731
    return {
        "depth in the scheduler": (scheduler, "depth_of", marked, False),
        "depth in the worker": (steps, "depth_of", marked, False),
        "admission to the sampler": (LaneSampler, "admit", of_poison, False),
        "admission to the draws": (sampling.Draws, "admit", drawn, True),
        "admission, nothing written": (transitions.requests, "admit", limit, False),
        "admission, all written": (transitions.requests, "admit", limit, True),
        "second chunk of a prompt": (
            lanes,
            "_prompt",
            lambda request, row, count: is_poison(request.name) and request.computed > 40,
            False,
        ),
        "noise": (sampling, "waiting_times", lambda seed, *_: bool((seed == 4242).any()), False),
        "vLLM's sampler": (
            LaneSampler,
            "_sample",
            lambda self, logits, best, row, *_, **__: any(of_row(r) for r in row),
            False,
        ),
        "log-probabilities of the prompt": (lanes.reader, "read", lambda request, *_: is_poison(request.name), False),
        "mask of a grammar": (XgrammarGrammar, "fill_bitmask", of_grammar, False),
        "step of a grammar": (XgrammarGrammar, "accept_tokens", of_grammar, False),
    }


def run(case: dict) -> dict:
    from vllm import LLM

    os.environ.update(case["environment"])
    options = {"dtype": "float32", "max_model_len": 160, "block_size": 32, "seed": 0, "max_num_seqs": 6}
    options |= {"max_num_batched_tokens": 48, "kv_cache_memory_bytes": 1 << 26}
    lanes = LaneConfig(compile=False, passes_per_step=4)
    llm = LLM(case["folder"], **options | lanes.flags() | had(case["engine"]))
    engine: Any = llm.llm_engine
    core = engine.engine_core.engine_core
    known, rounds = faults(core), {}
    for name, poisoned in case["faults"].items():
        asked = list(case["requests"])
        asked[POISON] = {**asked[POISON], "sampling": poisoned}
        clean = _round(engine, asked)
        owner, attribute, wrong, after = known[name]
        with patch.object(owner, attribute, fails(getattr(owner, attribute), wrong, after)):
            faulty = _round(engine, asked)
        rounds[name] = [clean, faulty]
    engine.step()
    pool = core.scheduler.kv_cache_manager.block_pool
    held = {"blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(), "requests": len(core.scheduler.requests)}
    lanes = core.model_executor.driver_worker.worker.model_runner.steps
    rows = lanes.loop.config.max_num_seqs - len(lanes.free) + len(lanes.sampler.requests) + len(lanes.held)
    held |= {"rows": rows, "features": len(lanes.loop.work.in_use)}
    engine.engine_core.shutdown()
    return {"rounds": rounds, "held": held, "faults": list(known)}


def _round(engine: Any, asked: list[dict]) -> list[dict]:
    """Tokens and finish reason of every request; each comes at its step, and finds an empty prefix cache."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    engine.reset_prefix_cache()
    answers, waiting, step = {}, list(enumerate(asked)), 0
    while waiting or engine.has_unfinished_requests():
        for number, request in [item for item in waiting if item[1]["arrive"] <= step]:
            fields = dict(request["sampling"])
            if grammar := fields.pop("structured_outputs", None):
                fields["structured_outputs"] = StructuredOutputsParams(**grammar)
            params = SamplingParams(**fields, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
            engine.add_request(str(number), {"prompt_token_ids": request["prompt"]}, params)
        waiting = [item for item in waiting if item[1]["arrive"] > step]
        for output in engine.step():
            done = output.outputs[0]
            answers[int(output.request_id)] = {"tokens": list(done.token_ids), "reason": done.finish_reason}
        step += 1
        assert step < 2000, sorted(answers)
    return [answers[number] for number in range(len(asked))]


if __name__ == "__main__":
    main(run)
