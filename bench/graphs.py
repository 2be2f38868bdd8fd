"""CUDA graphs over many mixes of requests: captures, graphs kept, memory, and ticks after the start.

    python -m bench.graphs [--device cuda] [--rows 256] [--mixes 680] [--hidden 2048] [--layers 8]
       [--vocabulary 131072]

On a GPU it answers: does a mix capture after the start, what does a capture cost, is `graphs.reserved_bytes` enough,
and is the p99 of a step at most twice its median? On a CPU, functions are called in place of graphs: counts alone.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig

from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.serve import Engine, Params
from loopwise.serve.engine.graphs import GraphCache, on_cuda, reserved_bytes, sizes

from .figures import add

SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}]
RULES: list[dict[str, Any]] = [{}, {"exit_rule": "latent-diff"}, {"exit_rule": "cosine"}]
EVERY = 100  # mixes after which the figures so far are added, as a run may be killed


def call(function: Callable[[], None]) -> Callable[[], Any]:
    function()
    return function


def model(options: argparse.Namespace) -> RecurrentDepthForCausalLM:
    source = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(options.hidden // 128, 1),
        num_key_value_heads=max(options.hidden // 512, 1),
        max_position_embeddings=1024,
    )
    half = options.layers // 2
    config = RecurrentDepthConfig(
        source_config=source,
        prelude=[0],
        core=[*range(1, half + 1)],
        coda=[*range(half + 1, options.layers)],
        num_recurrences=4,
        kv_policy="last-exited",
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        made = RecurrentDepthForCausalLM(config).eval()
    return made.bfloat16() if options.device == "cuda" else made


def main() -> None:
    parser = argparse.ArgumentParser(description="CUDA graphs over many mixes of requests")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in (("rows", 256), ("mixes", 680), ("hidden", 2048), ("layers", 8), ("vocabulary", 131_072)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    engine = Engine(model(options), max_num_seqs=options.rows, max_model_len=64, cuda_graphs=False)
    with torch.inference_mode():
        engine._record(on_cuda(torch.device("cuda")) if on_gpu else call)
    ticks = engine.loop.graph_tick
    assert ticks is not None
    free, start = torch.cuda.mem_get_info()[0] if on_gpu else 0, time.perf_counter()
    ticks.record_common(exits=False)
    taken = free - torch.cuda.mem_get_info()[0] if on_gpu else 0
    at_start, spent = ticks.cache.captures, time.perf_counter() - start
    reserved = reserved_bytes(options.rows, options.vocabulary) >> 20
    print(
        f"start: {at_start} graphs in {spent:.1f} s, {taken / 2**20:.0f} MiB; reserved: {reserved:.0f} MiB", flush=True
    )
    add("graphs at the start", at_start, f"in {spent:.1f} s", MiB=taken >> 20, reserved=reserved)
    steps: list[float] = []
    step = engine.loop.step

    def timed(live: torch.Tensor) -> None:
        begin = time.perf_counter()
        step(live)
        steps.append(time.perf_counter() - begin)

    engine.loop.step = timed
    mixes = itertools.cycle(itertools.product(sizes(options.rows), SAMPLING, RULES))
    for number, (rows, sampling, rule) in enumerate(itertools.islice(mixes, options.mixes)):
        params = Params(4, ignore_eos=True, seed=number, **sampling, **rule)
        engine.generate([[5 + n % 90, 6, 7] for n in range(rows)], params)
        if (number + 1) % EVERY == 0 or number + 1 == options.mixes:
            tell(ticks.cache, at_start, number + 1, steps)


def tell(cache: GraphCache, at_start: int, mixes: int, steps: list[float]) -> None:
    """Print and note captures after the start, and the seconds of `steps`, over so many mixes."""
    ordered, later = sorted(steps), cache.captures - at_start
    median, p99 = ordered[len(ordered) // 2] * 1e3, ordered[int(len(ordered) * 0.99)] * 1e3
    print(f"{mixes} mixes: {later} captures more, {len(cache.used)} graphs kept, {cache.failures} captures failed;")
    print(f"  a step: median {median:.1f} ms, p99 {p99:.1f} ms", flush=True)
    add("captures after the start", later, f"in {mixes} mixes", failed=cache.failures)
    add(f"a step, {mixes} mixes", median, "ms", p99=round(p99, 2))


if __name__ == "__main__":
    main()
