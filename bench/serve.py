"""`loopwise serve`: the lane engine against one depth for all, side by side.

    python -m bench.serve offline [--pairs 7] [--requests 32] [--policy last-exited] [--lora 16] [--eager]
    python -m bench.serve offline --decode --seats 16 --requests 48 [--policy single] [--resident 32]
    python -m bench.serve source MODEL [--pairs 7] [--requests 16] [--sizes 10,10,10] [--recurrences 1,2,4]
    python -m bench.serve routed  [--pairs 7]
    python -m bench.serve http    [--pairs 7] [--clients 32] [--load 0.5,0.8,0.95,1.2]
    python -m bench.serve http --waves 0.25 [--pairs 7] [--clients 32] [--load 0.8] [--seconds 30]

A Llama-shaped model of random weights in bfloat16 (d=1024, a core of 4 layers, 8,192 tokens, R=8). Prompts of 16 to 48
tokens are continued by 64. Depths are forced: a truncated geometric of mean 3. Systems run the same requests one after
the other in every pair:

    fixed       engine=fixed, compiled and in graphs as vLLM does by default (--eager: neither this nor the others are)
    full        engine=lanes, every token at full depth
    exits       engine=lanes, generated tokens exit, prompts run at full depth
    prompts     engine=lanes, prompts exit, too
    lora        exits, on the model with LoRA of every depth
    compaction  exits, but the place of a token that has left stays empty until the last of its pass has (--decode)
    generate    transformers' generate, static batches at full depth (--decode)

Printed: tokens a second, the median ratio to `fixed` with its spread, and its share of the FLOP bound, end to end:
(all positions at R) / (what was asked). `offline --decode` takes the time to the first tokens off; with `--resident`,
the lane engine holds more requests than a pass has lanes, so that exits wait for others without leaving lanes empty.
`http` runs `loopwise serve` for both engines with as many clients; `--load` adds open loops of Poisson arrivals at
those shares of the capacity that `exits` showed, with percentiles of the times to the first token, between chunks and
of whole replies. `http --waves` has open loops alone, at full depth, with that share of the requests as waves. It
prints how much longer each percentile of the plain requests is than with the same arrivals and no waves, and an A/A.
Random weights seldom draft the right token, so waves take all lanes that they may, and waste most.
`routed` is Mixture-of-Recursions by thresholds, against the same at full recursion. `source` compares with what a user
has before the conversion: plain vLLM on the pretrained MODEL (a directory or a GGUF file) against its retrofit in
lanes, at each number of recurrences, and the share of what the FLOPs allow (head and injection counted).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .figures import add
from .forced import DEPTHS, OUTPUT, Bound, Job, jobs, make, report, share
from .over_http import CACHE, SHARE, over_http

ENGINE = {"max_model_len": 256, "block_size": 32, "max_num_batched_tokens": 2048, "enable_prefix_caching": False}


# ---- offline ------------------------------------------------------------------------------------------------------
def in_process(seats: int) -> dict[str, Any]:
    """Arguments of a vLLM engine in this process, for as many requests at once. Call it before vLLM is imported.

    Scheduling is left to vLLM: asynchronous on a GPU, but for lanes.
    """
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    options: dict[str, Any] = {**ENGINE, "dtype": "bfloat16", "max_num_seqs": seats}
    return options | {
        "kv_cache_memory_bytes": CACHE, "gpu_memory_utilization": SHARE, "disable_log_stats": True
    }  # fmt: skip


def lane_flags(args: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """Arguments of vLLM for lanes with these `settings`, compiled and in graphs unless `args.eager`."""
    from loopwise.serve.api.lanes import LaneConfig

    fast = {"compile": not args.eager, "graphs": not args.eager}
    return LaneConfig(args.passes_per_step, **{"coda_wait": args.coda_wait, **fast, **settings}).flags()


def offline(args: argparse.Namespace, folders: dict[str, Path], bound: Bound) -> None:
    options = in_process(args.seats or args.requests)
    from vllm import LLM, SamplingParams

    from loopwise.serve.engine.kv import KVPolicy

    most = options["max_num_seqs"] if args.resident else 0
    lanes = {**options, **lane_flags(args, max_lanes=most)}
    lanes["max_num_seqs"] = args.resident or options["max_num_seqs"]
    lanes["hf_overrides"] = {"kv_policy": args.policy}
    lanes["enable_chunked_prefill"] = not KVPolicy(args.policy, DEPTHS).overwrites
    fixed = {"enforce_eager": args.eager, "additional_config": {"loopwise": {"engine": "fixed"}}}
    engines = {"fixed": LLM(str(folders["plain"]), **options, **fixed)}
    engines["lanes"] = LLM(str(folders["plain"]), **lanes)
    systems = ["fixed", "full", "exits", *([] if args.decode else ["prompts"])]
    if args.lora:
        engines["lora"] = LLM(str(folders["lora"]), **lanes)
        systems.append("lora")
    if args.decode:  # exits wait for the last of their token's pass: no successor takes the place that one leaves
        every = lane_flags(args, coda_wait=DEPTHS)
        seats = {"max_num_seqs": options["max_num_seqs"]}
        engines["compaction"] = LLM(str(folders["plain"]), **{**lanes, **every, **seats})
        generate = transformers_generate(folders["plain"], options["max_num_seqs"])
        systems += ["compaction", "generate"]

    def seconds_of(system: str, work: list[Job], tokens: int) -> float:
        if system == "generate":
            return generate(work, tokens)
        engine = engines.get(system, engines["lanes"])
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=None if system == "fixed" else job.fields,
            )
            for job in work
        ]
        began = time.perf_counter()
        done = engine.generate([{"prompt_token_ids": job.prompt} for job in work], params, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert all(len(one.outputs[0].token_ids) == tokens for one in done), "a request ended early"
        return seconds

    def measure(system: str, work: list[Job]) -> float:
        """Tokens a second; of decoding alone, what the first tokens take is left out."""
        seconds = seconds_of(system, work, OUTPUT)
        if args.decode:
            return len(work) * (OUTPUT - 1) / (seconds - seconds_of(system, work, 1))
        return len(work) * OUTPUT / seconds

    rates: dict[str, list[float]] = {system: [] for system in systems}
    bounds = {}
    for pair in range(args.pairs + 1):
        for system in systems:
            work = jobs(random.Random(pair), args.requests, system)
            rate = measure(system, work)
            bounds[system] = share(bound, work)[:: -1 if args.decode else 1]
            if pair:  # the first one warms up
                rates[system].append(rate)
        print(f"pair {pair}: " + ", ".join(f"{s} {r[-1]:.0f}" for s, r in rates.items() if r), flush=True)
    report(rates, bounds)


def of_source(args: argparse.Namespace, work: Path) -> None:
    """Plain vLLM on `args.model` against its retrofit in lanes, at each of `args.recurrences`."""
    from loopwise.cli import main as loopwise

    recurrences = [int(r) for r in args.recurrences.split(",")]
    keys = [f"sizes={args.sizes}", "injection=linear", f"num_recurrences={max(recurrences)}", "dtype=bfloat16"]
    assert loopwise(["convert", str(args.model), str(work / "looped"), *keys, "--no-verify"]) == 0
    assert loopwise(["export", str(work / "looped"), str(work / "plain"), "--unroll", "1", "--no-verify"]) == 0
    options = in_process(args.requests)
    shares = flop_shares(work / "looped", recurrences)
    from vllm import LLM, SamplingParams

    overrides = {"kv_policy": args.policy, "max_recurrences": max(recurrences)}
    lanes = {**options, **lane_flags(args), "hf_overrides": overrides}
    plain = LLM(str(work / "plain"), **options, enforce_eager=args.eager)
    looped = LLM(str(work / "looped"), **lanes)

    def rate(engine: Any, seed: int, depth: int | None) -> float:
        draw = random.Random(seed)
        prompts = [draw.choices(range(100, 5000), k=draw.randint(16, 48)) for _ in range(args.requests)]
        more = None if depth is None else {"num_recurrences": depth, "exit_rule": "fixed"}
        params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True, detokenize=False, extra_args=more)
        began = time.perf_counter()
        engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return args.requests * OUTPUT / (time.perf_counter() - began)

    ratios: dict[int, list[float]] = {depth: [] for depth in recurrences}
    for pair in range(args.pairs + 1):
        base = rate(plain, pair, None)
        found = {depth: rate(looped, pair, depth) for depth in recurrences}
        if pair:  # the first one warms up
            for depth, value in found.items():
                ratios[depth].append(value / base)
        print(f"pair {pair}: source {base:.0f} tok/s, " + ", ".join(f"R={d} {v:.0f}" for d, v in found.items()))
    for depth, values in ratios.items():
        ratio, bound = statistics.median(values), shares[depth]
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(
            f"R={depth}: {ratio:.2f}x plain vLLM on the source ({spread}), FLOPs {bound:.2f}, share {ratio / bound:.1%}"
        )
        add(f"lanes at R={depth} against plain vLLM", ratio, "x", spread=spread, flops=round(bound, 3))


def flop_shares(folder: Path, recurrences: list[int]) -> dict[int, float]:
    """Multiply-adds of a token in the source, divided by those of the retrofit in `folder`, for each depth."""
    import torch

    from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM

    with torch.device("meta"):
        model = RecurrentDepthForCausalLM(RecurrentDepthConfig.from_pretrained(folder))
    parts = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("prelude", "core", "coda")}
    head = model.get_output_embeddings().weight.numel()
    loop = parts["core"] + sum(p.numel() for p in model.injection.parameters())
    outside = parts["prelude"] + parts["coda"] + head
    return {depth: (outside + parts["core"]) / (outside + depth * loop) for depth in recurrences}


def routed(args: argparse.Namespace, work: Path) -> None:
    """Expert-choice at R = 4 whose thresholds let about half of the tokens on at each depth, against the same with
    none leaving, in decoding."""
    options = in_process(args.requests)
    from vllm import LLM, SamplingParams

    options |= lane_flags(args)
    engines, passes, items = {}, {}, {}
    for full in (True, False):
        thresholds = [0.0] * 4 if full else [0.0, 0.45, 0.5, 0.5]
        bound = make(work / str(full), router={"kind": "expert", "thresholds": thresholds, "alpha": 0.7})
        engines[full] = LLM(str(work / str(full)), **options)
        core: Any = engines[full].llm_engine.engine_core
        passes[full] = core.engine_core.model_executor.driver_worker.worker.model_runner.steps.loop.counts.passes
    draw = random.Random(0)
    prompts = [{"prompt_token_ids": draw.choices(range(3, 8000), k=32)} for _ in range(args.requests)]

    def run(full: bool, tokens: int) -> tuple[float, int]:
        passes[full].clear()
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        engines[full].generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began, sum(lanes * count for lanes, count in passes[full].items())

    ratios = []
    for pair in range(args.pairs + 1):
        seconds = {}
        for full in engines:
            (first, before), (whole, after) = run(full, 1), run(full, OUTPUT)
            seconds[full], items[full] = whole - first, after - before
        if pair:  # the first one warms up
            ratios.append(seconds[True] / seconds[False])
    tokens, ratio = args.requests * (OUTPUT - 1), statistics.median(ratios)
    flops = {full: tokens * bound.once + items[full] * bound.core for full in engines}
    print(
        f"routed: {items[False] / tokens:.2f} of {items[True] / tokens:.2f} recurrences a token, {ratio:.2f}x the "
        f"throughput of full recursion ({min(ratios):.2f} to {max(ratios):.2f}), bound "
        f"{flops[True] / flops[False]:.2f}, share {ratio * flops[False] / flops[True]:.1%}"
    )


def transformers_generate(folder: Path, batch: int) -> Callable[[list[Job], int], float]:
    """Seconds of transformers' own generate, at full depth, for static batches of jobs."""
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)

    def run(work: list[Job], tokens: int) -> float:
        began = time.perf_counter()
        for some in (work[n : n + batch] for n in range(0, len(work), batch)):
            longest = max(len(job.prompt) for job in some)
            ids = torch.tensor([[0] * (longest - len(job.prompt)) + job.prompt for job in some], device=device)
            mask = (torch.arange(longest) >= torch.tensor([[longest - len(job.prompt)] for job in some])).to(device)
            limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            done = model.generate(ids, attention_mask=mask, **limits)
            assert done.shape[1] == longest + tokens, "a batch ended early"
        return time.perf_counter() - began

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("where", choices=["offline", "http", "routed", "source"])
    parser.add_argument("model", nargs="?", type=Path, help="source: a pretrained model")
    parser.add_argument("--sizes", default="10,10,10", help="source: layers of prelude, core and coda")
    parser.add_argument("--recurrences", default="1,2,4", help="source: numbers of recurrences")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--requests", type=int, default=32, help="offline: requests at once")
    parser.add_argument("--seats", type=int, default=0, help="offline: requests that run at once; 0: all")
    parser.add_argument(
        "--resident", type=int, default=0, help="offline: requests in the lane engine, --seats of which have a lane"
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="offline: decoding alone, against compaction and transformers' generate, too",
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--each", type=int, default=3, help="requests of a client in a pair")
    parser.add_argument("--policy", default="last-exited", help="kv_policy of the lane engine")
    parser.add_argument("--passes-per-step", "--ticks", type=int, default=16)
    parser.add_argument("--coda-wait", type=int, help="default: measured")
    parser.add_argument("--lora", type=int, default=0, help="offline: rank of the LoRA of every depth")
    parser.add_argument("--eager", action="store_true", help="nothing is compiled")
    parser.add_argument("--load", default="", help="http: shares of the capacity, as 0.5,0.8,0.95,1.2")
    parser.add_argument("--waves", type=float, default=0.0, help="http: share of the requests that are waves")
    parser.add_argument("--seconds", type=float, default=30, help="http: of each load")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with tempfile.TemporaryDirectory() as work:
        if args.where == "source" and args.model is None:
            parser.error("source needs MODEL, a pretrained model")
        if args.where in ("routed", "source"):
            (routed if args.where == "routed" else of_source)(args, Path(work))
            return
        folders = {"plain": Path(work) / "plain"}
        bound = make(folders["plain"])
        if args.lora:
            folders["lora"] = Path(work) / "lora"
            make(folders["lora"], args.lora)
        if args.where == "offline":
            offline(args, folders, bound)
        else:
            asyncio.run(over_http(args, folders["plain"], bound))


if __name__ == "__main__":
    main()
