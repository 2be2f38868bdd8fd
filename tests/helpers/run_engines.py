"""Runs vLLM engines one after another in this process, which therefore is not pytest's: vLLM pins it to a core.

usage: run_engines.py CASES.json RESULTS.json       CASES: a list of {folder, prompts, tokens, engine, environment}
RESULTS: for each case what two identical rounds of requests gave, the prefix-cache hits of the second, how many
parameters vLLM holds and how many KV caches.
"""

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from unittest.mock import patch


def run(case: dict) -> dict:
    from vllm import LLM, SamplingParams

    os.environ.update(case["environment"])
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32, "seed": 0}
    # Four at a time and 64 tokens a step: prompts wait, are chunked, and share steps with decoding ones.
    options |= {"max_num_seqs": 4, "max_num_batched_tokens": 64, "disable_log_stats": False}
    options |= {"kv_cache_memory_bytes": 1 << 26, "additional_config": {"loopwise": {"engine": "fixed"}}}
    llm = LLM(case["folder"], **options | case["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=case["tokens"], ignore_eos=True, logprobs=0)
    rounds = []
    for _ in range(2):
        out = llm.generate([{"prompt_token_ids": p} for p in case["prompts"]], sampling, use_tqdm=False)
        rounds.append([_answer(o.outputs[0]) for o in out])
    hits = sum(getattr(m, "value", 0) for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")
    size = llm.apply_model(_size)[0] if "tensor_parallel_size" not in case["engine"] else {}
    llm.llm_engine.engine_core.shutdown()
    return {"rounds": rounds, "prefix_hits": hits, **size}


def _size(model) -> dict:
    names = {module.layer_name for module in model.modules() if hasattr(module, "layer_name")}
    return {"parameters": sum(p.numel() for p in model.parameters()), "caches": len(names)}


def _answer(output) -> dict:
    tokens = list(output.token_ids)
    return {"tokens": tokens, "logprobs": [at[t].logprob for t, at in zip(tokens, output.logprobs, strict=True)]}


def main(run: Callable[[dict], dict]) -> None:
    """`run` every case of the file that the command names; an error is a case's result, too."""
    from vllm import _custom_ops
    from vllm.platforms.cpu import CpuPlatform

    # A handler of an engine that has ended may be collected while the next one compiles: where all tensors are fake, it
    # fails without end, and with it the process. It is left alone.
    patch.object(_custom_ops.CPUDNNLGEMMHandler, "__del__", lambda _: None).start()
    gc.collect = lambda *_: 0  # vLLM collects seven times an engine, through all that is imported: half the time
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    results = []
    for case in cases:
        try:
            results.append(run(case))
        except Exception:
            results.append({"error": traceback.format_exc()})
        patch.object(CpuPlatform, "register_triton_kernel_overrides").start()  # once is enough
        with open(sys.argv[2], "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main(run)
