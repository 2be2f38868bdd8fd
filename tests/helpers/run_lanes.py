"""Runs lane engines of vLLM one after another in this process, which therefore is not pytest's.

usage: run_lanes.py CASES.json RESULTS.json      CASES: a list of {folder, engine, requests, refused, environment,
preempt, resumed_as_new, kernel_block, calls}; a request is {prompt, sampling, arrive, abort}. The latter two, and when
all that run are preempted, count engine steps; `refused` are sampling parameters that the engine is asked for before.
With `resumed_as_new`, the scheduler sends resumed requests as for vLLM's second model runner. Attention takes blocks of
`kernel_block` alone. `calls` are methods of the worker, with arguments, that are called between two rounds. RESULTS:
what came of each request, what was said to the refused, and what the engine held at the end.
"""

import os
from typing import Any
from unittest.mock import patch

from loopwise.serve.api.lanes import LaneConfig
from tests.helpers.run_engines import had, main


def run(case: dict) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    os.environ.update(case["environment"])
    options = {"dtype": "float32", "max_model_len": 128, "block_size": 32, "seed": 0, "max_num_seqs": 6}
    # 48 tokens a step: prompts wait, are chunked, and share steps with decoding ones.
    options |= {"max_num_batched_tokens": 48, "disable_log_stats": False, "kv_cache_memory_bytes": 1 << 26}
    lanes = LaneConfig(**{"compile": False} | case.get("lanes", {}))
    kernels = (
        [case["kernel_block"]] if "kernel_block" in case else CPUAttentionBackend.get_supported_kernel_block_sizes()
    )
    with patch.object(CPUAttentionBackend, "get_supported_kernel_block_sizes", staticmethod(lambda *_: kernels)):
        llm = LLM(case["folder"], **options | lanes.flags() | had(case["engine"]))
    engine: Any = llm.llm_engine
    core = engine.engine_core.engine_core
    core.scheduler.use_v2_model_runner = case.get("resumed_as_new", False)
    engine.step()  # nothing to do
    refused = [_refusal(engine, case["requests"][0]["prompt"], fields) for fields in case.get("refused", ())]
    rounds = []
    for number in range(case.get("rounds", 1)):
        answers: dict = {}
        for name, *given in case.get("calls", ()) if number else ():
            llm.collective_rpc(name, args=tuple(given))
        back = -1 if number % 2 else 1  # every other round the other way round
        waiting = sorted(enumerate(case["requests"]), key=lambda item: back * item[1]["arrive"])
        start = min(back * request["arrive"] for request in case["requests"])
        sent: set[int] = set()
        step = 0
        while waiting or engine.has_unfinished_requests():
            while waiting and back * waiting[0][1]["arrive"] - start <= step:
                number, request = waiting.pop(0)
                params = SamplingParams(**_sampling(request["sampling"]), output_kind=RequestOutputKind.FINAL_ONLY)
                engine.add_request(str(number), {"prompt_token_ids": request["prompt"]}, params)
                sent.add(number)
            for number, request in enumerate(case["requests"]):
                if request["abort"] == step and number in sent and number not in answers:
                    engine.abort_request([str(number)])
                    answers[number] = None
            if step in case.get("preempt", ()):
                engine.reset_prefix_cache(reset_running_requests=True)
            for output in engine.step():
                done: Any = output
                if done.finished and done.outputs[0].finish_reason != "abort":
                    answers[int(done.request_id)] = _answer(done)
            step += 1
            assert step < 5000, f"stuck: {sorted(set(range(len(case['requests']))) - set(answers))}"
        rounds.append([answers.get(number) for number in range(len(case["requests"]))])
    metrics = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    engine.step()  # tells the worker about the last requests that ended
    pool = core.scheduler.kv_cache_manager.block_pool
    held = {"blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(), "requests": len(core.scheduler.requests)}
    counts = llm.collective_rpc("recurrence_counts")[0]
    if "tensor_parallel_size" not in case["engine"]:
        runner = core.model_executor.driver_worker.worker.model_runner
        real = runner._loop(runner.device, None, None).nbytes
        assert runner.state_bytes() == real > 1 << 16  # what is kept free of keys and values on a GPU
        runner.profile_run()
    engine.engine_core.shutdown()
    return {
        "rounds": rounds,
        "refused": refused,
        "held": held,
        "preemptions": metrics["vllm:num_preemptions"],
        "prefix_hits": metrics["vllm:prefix_cache_hits"],
        "counts": counts,
    }


def _sampling(fields: dict) -> dict:
    from vllm.sampling_params import StructuredOutputsParams

    fields = dict(fields)
    if "structured_outputs" in fields:
        fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
    if "logit_bias" in fields:  # JSON has no integer keys
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    return fields


def _refusal(engine: Any, prompt: list[int], fields: dict) -> str:
    """The message for a user who asks for that; empty where the engine accepts it."""
    from vllm import SamplingParams

    try:
        engine.add_request("refused", {"prompt_token_ids": prompt}, SamplingParams(**fields))
    except ValueError as error:
        return str(error)
    return ""


def _answer(output) -> dict:
    done = output.outputs[0]
    tokens = list(done.token_ids)
    answer = {
        "tokens": tokens,
        "depths": done.routed_experts[:, 0].tolist(),
        "reason": done.finish_reason,
        "text": done.text,
    }
    if done.logprobs:
        answer["logprobs"] = [at[t].logprob for t, at in zip(tokens, done.logprobs, strict=True)]
    if output.prompt_logprobs:
        prompt = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        answer["prompt_logprobs"] = [at[t].logprob for t, at in prompt]
    return answer


if __name__ == "__main__":
    main(run)
