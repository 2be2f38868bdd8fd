"""Runs `vllm.LLM(MODEL)` as a user of vLLM does, in this process, which therefore is not pytest's.

usage: run_plain.py CASES.json RESULTS.json      CASES: a list of {folder, engine, prompts, tokens, fields}; `fields`:
for each round of the prompts, the extra arguments of its requests. RESULTS: by round and prompt, the tokens and the
depths in the output, None without; the class of the worker.
"""

from typing import Any

from tests.helpers.run_engines import main


def run(case: dict) -> dict:
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32, "max_num_seqs": 4}
    llm = LLM(case["folder"], **options, kv_cache_memory_bytes=1 << 26, **case["engine"])
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
    rounds = []
    for fields in case["fields"]:
        params = SamplingParams(temperature=0, max_tokens=case["tokens"], ignore_eos=True, extra_args=fields)
        rounds.append([one.outputs[0] for one in llm.generate(prompts, params, use_tqdm=False)])
    llm.llm_engine.engine_core.shutdown()
    return {
        "tokens": [[list(one.token_ids) for one in outputs] for outputs in rounds],
        "depths": [[_depths(one.routed_experts) for one in outputs] for outputs in rounds],
        "worker": llm.llm_engine.vllm_config.parallel_config.worker_cls,
    }


def _depths(rows: Any) -> list[int] | None:
    return None if rows is None else rows[:, 0].tolist()


if __name__ == "__main__":
    main(run)
