"""Checks before vLLM's engine starts, most of them of `loopwise serve`. vLLM has been imported when they run."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...checkpoint import config_fields
from ...errors import UserError
from ...sampling import greatest_id
from ..api.generation_config import APPLIED, fields_of, sampling_of, warning
from ..defaults import Defaults
from ..memory import BLOCK, GIB, available, check_cache, serving_bytes, shown

SPACE = "VLLM_CPU_KVCACHE_SPACE"  # in GiB


def apply_generation_config(model_config: Any) -> None:
    """Give `do_sample` of the model's generation_config.json its meaning in transformers, unless flags replace it.

    Changes vLLM's `model_config`, and prints a warning that names the fields that vLLM ignores.
    """
    given = model_config.generation_config
    if given == "vllm":
        return
    fields = fields_of(model_config.model if given == "auto" else given)
    if sampling_of(fields).get("temperature") == 0:
        model_config.override_generation_config = {"temperature": 0.0} | (model_config.override_generation_config or {})
    if line := warning(fields, APPLIED):
        print(f"loopwise: {line}", file=sys.stderr)


def compare_vocabularies(model: str, tokenizer: Any) -> None:
    """Print a warning where the tokenizer has ids that the model has no embedding for; such requests are refused."""
    fields = config_fields(Path(model))
    count = fields.get("vocab_size") or fields["source_config"].get("vocab_size")
    if isinstance(count, int) and (greatest := greatest_id(tokenizer)) >= count:
        print(
            f"loopwise: warning: the tokenizer has ids up to {greatest}, the model a vocabulary of {count} tokens: "
            "requests with others are refused",
            file=sys.stderr,
        )


def check_memory(args: Any, defaults: Defaults) -> str | None:
    """A line on the memory of keys and values; None where the size of the cache is not known yet.

    Raises UserError where a request of the greatest length does not fit into the cache, as far as that is known before
    the engine starts.
    """
    from vllm.platforms import current_platform

    from ...load import read_config

    config = read_config(args.model)
    depth, most = (args.hf_overrides[name] for name in ("num_recurrences", "max_recurrences"))
    size = 4 if args.dtype in ("float32", "float") else 2
    ranks = args.tensor_parallel_size

    def each(depths: int) -> int:
        policy = replace(defaults.policy, depths=depths) if defaults.engine == "lanes" else None
        config.num_recurrences = depths
        return serving_bytes(config, policy, size, ranks)

    deep = most if defaults.engine == "lanes" else depth
    name = "max_recurrences" if defaults.engine == "lanes" else "num_recurrences"
    budget, cpu = args.kv_cache_memory_bytes, current_platform.is_cpu()
    if cpu and os.environ.get(SPACE):
        if not os.environ[SPACE].isdecimal():
            raise UserError(f"{SPACE}={os.environ[SPACE]}: a whole number of GiB")
        budget = int(os.environ[SPACE]) * GIB  # as in vLLM, the variable wins
    length = args.max_model_len or getattr(config, "max_position_embeddings", None)
    free = available() if cpu else None
    if budget and free is not None and budget > free:
        raise UserError(f"{shown(budget)} for keys and values: {shown(free)} are free; {SPACE}={free // GIB}")
    if budget is None and not cpu:
        budget = int(current_platform.get_device_total_memory() * args.gpu_memory_utilization)
    if not budget:
        return None
    if length and length > 0:
        advice = [f"{name}={d}" for d in range(deep - 1, 0, -1) if each(d) * (length + BLOCK) <= budget][:1]
        space = -(-each(deep) * (length + BLOCK) // GIB)
        if cpu and (free is None or space * GIB < free):
            advice.append(f"{SPACE}={space}")
        check_cache(each(deep), length, budget, f"{name}={deep}", [] if defaults.router else advice)
    line = f"{shown(each(deep))} of keys and values a token at {name}={deep}"
    if cpu or args.kv_cache_memory_bytes:
        line += f", in a cache of {shown(budget)}: {budget // each(deep):,} tokens of all requests"
    return line


def check_block_size(size: int) -> None:
    """Raises UserError for a block `size` that vLLM's attention on CPUs does not support: its engine would die."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if not CPUAttentionBackend.supports_block_size(size):
        bases = [getattr(kind, "base", kind) for kind in CPUAttentionBackend.get_supported_kernel_block_sizes()]
        rule = " or ".join(map(str, bases))
        raise UserError(f"--block-size {size}: vLLM's attention on CPUs needs a multiple of {rule}")


def lacks_compiler() -> bool:
    """True where torch.compile finds no C++ compiler; prints a line about it."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        print("loopwise: no C++ compiler (g++): the core is not compiled", file=sys.stderr)
        return True
    return False


def share_cores(ranks: int) -> str:
    """This process's cores, shared among tensor-parallel ranks, as `0,1|2,3`. vLLM's own binding needs a NUMA node for
    each. Raises UserError where there are fewer cores than ranks."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < ranks:
        raise UserError(f"--tensor-parallel-size {ranks}: needs a core for each rank, this process has {len(cores)}")
    each = len(cores) // ranks
    return "|".join(",".join(map(str, cores[rank * each : (rank + 1) * each])) for rank in range(ranks))
