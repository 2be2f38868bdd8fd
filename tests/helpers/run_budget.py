"""Runs short requests beside long prompts in lane engines of vLLM, and measures what the short ones wait.

usage: run_budget.py CASES.json RESULTS.json      CASES: a list of {folder, environment, depth, long, budget, shorts};
`depth` is that of the prompts of `long` tokens, `budget` max_num_batched_tokens. RESULTS: passes and lanes of every
step; for each short request its latency in lanes of passes, which are the same on every machine, and in seconds.
"""

import os
import random
import time
from collections import Counter
from typing import Any

from loopwise.serve.api.lanes import LaneConfig
from tests.helpers.run_engines import main

FIXED = 16  # a pass costs as much as so many lanes, and its lanes
SHORT = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "extra_args": {"num_recurrences": 4}}


def run(case: dict) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    os.environ.update(case["environment"])
    options = {"dtype": "float32", "max_model_len": case["long"] + 32, "block_size": 32, "max_num_seqs": 6}
    options |= {"max_num_batched_tokens": case["budget"], "kv_cache_memory_bytes": 1 << 28}
    options |= {"enable_prefix_caching": False}
    llm = LLM(case["folder"], **options, **LaneConfig(compile=False, passes_per_step=8, max_in_flight=1).flags())
    engine: Any = llm.llm_engine
    loop = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.steps.loop
    draw, clock = random.Random(0), 0
    longs, arrived, finished, steps = 0, dict[str, tuple[int, float]](), dict[str, tuple[int, float]](), []

    def add(name: str, tokens: int, fields: dict) -> None:
        params = SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY)
        engine.add_request(name, {"prompt_token_ids": [draw.randrange(256) for _ in range(tokens)]}, params)

    due = 0  # the clock at which the next short request comes
    while len(finished) < case["shorts"]:
        if not any(not name.startswith("short") for name in _resident(engine)):
            longs += 1
            add(
                f"long{longs}",
                case["long"],
                SHORT | {"max_tokens": 1, "extra_args": {"num_recurrences": case["depth"]}},
            )
        while due <= clock and len(arrived) < case["shorts"]:
            name = f"short{len(arrived)}"
            arrived[name] = due, time.perf_counter()
            add(name, 8, SHORT)
            due += draw.randrange(20 * FIXED, 60 * FIXED)
        before = Counter(loop.counts.passes)
        done = engine.step()
        made = Counter(loop.counts.passes) - before
        passes, lanes = made.total(), sum(n * count for n, count in made.items())
        steps.append([passes, lanes])
        clock += passes * FIXED + lanes
        for output in done:
            if output.request_id.startswith("short"):
                at, second = arrived[output.request_id]
                finished[output.request_id] = clock - at, time.perf_counter() - second
    engine.engine_core.shutdown()
    return {
        "steps": steps,
        "latency": [at for at, _ in finished.values()],
        "seconds": [s for _, s in finished.values()],
    }


def _resident(engine: Any) -> list[str]:
    return [request.request_id for request in engine.engine_core.engine_core.scheduler.requests.values()]


if __name__ == "__main__":
    main(run)
