"""`loopwise serve`: the lane engine against one depth for all, side by side.

    python bench/serve.py offline [--pairs 7] [--requests 32] [--policy last-exited] [--lora 16] [--eager]
    python bench/serve.py offline --decode --seats 16 --requests 48 [--policy single] [--resident 32]
    python bench/serve.py routed  [--pairs 7]
    python bench/serve.py http    [--pairs 7] [--clients 32] [--load 0.5,0.8,0.95,1.2]

A Llama-shaped model of random weights in bfloat16 (d=1024, a core of 4 layers, 8,192 tokens, R=8). Prompts of 16 to 48
tokens are continued by 64. Depths are forced: a truncated geometric of mean 3. Systems run the same requests one after
the other in every pair:

    fixed       engine=fixed, compiled as vLLM does by default (--eager: neither this nor the others are)
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
those shares of the capacity that `exits` showed, with percentiles of the time to the first token and between tokens.
`routed` is Mixture-of-Recursions by thresholds, against the same at full recursion.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEPTHS, VOCABULARY, OUTPUT, MEAN = 8, 8192, 64, 3.0
ENGINE = {"max_model_len": 256, "block_size": 32, "max_num_batched_tokens": 2048, "enable_prefix_caching": False}


@dataclass
class Job:
    """One request: its prompt, and the depth of every position."""

    prompt: list[int]
    trace: list[int]


@dataclass
class Bound:
    """Multiply-adds of a position: `once` in the head, `core` in a recurrence."""

    once: int
    core: int

    def work(self, depths: list[int], reads: int) -> int:
        return sum(depths) * self.core + reads * self.once


def make(folder: Path, lora: int = 0, router: dict[str, Any] | None = None) -> Bound:
    """Write the model, with a tokenizer, to `folder`. With a router, it has as many recurrences as thresholds."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM

    torch.manual_seed(0)
    source = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=2688, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    relaxation = {"depths": DEPTHS, "rank": dict.fromkeys(names, lora), "own": [], "dora": False} if lora else None
    depths = len(router["thresholds"]) if router else DEPTHS
    config = RecurrentDepthConfig(
        source_config=source, core=[0, 1, 2, 3], num_recurrences=depths, relaxation=relaxation, router=router
    )
    model = RecurrentDepthForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.startswith("router."):
            torch.nn.init.normal_(parameter, std=0.01 if "lora_" in name else 0.3)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:150]
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train([str(text) for text in texts], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    head = model.get_output_embeddings().weight.numel()
    return Bound(head, sum(p.numel() for p in model.core.parameters()))


def jobs(draw: random.Random, count: int, system: str) -> list[Job]:
    weights = geometric(MEAN)
    made = []
    for _ in range(count):
        prompt = draw.choices(range(3, 8000), k=draw.randint(16, 48))
        drawn = draw.choices(range(1, DEPTHS + 1), weights, k=len(prompt) + OUTPUT)
        if system in ("fixed", "full"):
            drawn = [DEPTHS] * len(drawn)
        elif system != "prompts":
            drawn[: len(prompt) - 1] = [DEPTHS] * (len(prompt) - 1)
        made.append(Job(prompt, drawn))
    return made


def geometric(mean: float) -> list[float]:
    """Weights of depths 1 .. DEPTHS, proportional to q^k, with this mean."""
    low, high = 1e-6, 1e3
    for _ in range(200):
        q = (low * high) ** 0.5
        weights = [q**k for k in range(1, DEPTHS + 1)]
        now = sum(k * w for k, w in enumerate(weights, 1)) / sum(weights)
        low, high = (q, high) if now < mean else (low, q)
    return weights


def share(bound: Bound, done: list[Job]) -> tuple[float, float]:
    """The FLOP bounds: how much less than at full depth was asked for, end to end and in decoding alone. The last
    token of a request is never run."""
    runs = [job.trace[:-1] for job in done]
    decoding = [job.trace[len(job.prompt) - 1 : -1] for job in done]

    def of(traces: list[list[int]]) -> float:
        full = sum(bound.work([DEPTHS] * len(trace), OUTPUT) for trace in traces)
        return full / sum(bound.work(trace, OUTPUT) for trace in traces)

    return of(runs), of(decoding)


def report(rates: dict[str, list[float]], bounds: dict[str, tuple[float, float]]) -> None:
    print(f"\n{'':<10}{'tok/s':>8}{'x fixed':>9}{'spread':>14}{'bound':>8}{'share':>8}{'other bound':>14}")
    for system, rate in rates.items():
        ratios = [mine / base for mine, base in zip(rate, rates["fixed"], strict=True)]
        ratio, (bound, decode) = statistics.median(ratios), bounds[system]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(
            f"{system:<10}{statistics.median(rate):>8.0f}{ratio:>9.2f}{spread:>14}{bound:>8.2f}{ratio / bound:>8.1%}"
            f"{decode:>14.2f}"
        )
    if "lora" in rates:
        slower = statistics.median(b / a for a, b in zip(rates["lora"], rates["exits"], strict=True)) - 1
        print(f"LoRA costs {slower:.1%}")


# ---- offline ------------------------------------------------------------------------------------------------------
def in_process(seats: int) -> dict[str, Any]:
    """Arguments of a vLLM engine in this process, for as many requests at once. Call it before vLLM is imported."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    options: dict[str, Any] = {**ENGINE, "dtype": "bfloat16", "max_num_seqs": seats}
    return options | {"kv_cache_memory_bytes": 1 << 30, "async_scheduling": False, "disable_log_stats": True}


def offline(args: argparse.Namespace, folders: dict[str, Path], bound: Bound) -> None:
    options = in_process(args.seats or args.requests)
    from vllm import LLM, SamplingParams

    from loopwise.serve.api.lanes import LaneConfig
    from loopwise.serve.engine.kv import KVPolicy

    most = options["max_num_seqs"] if args.resident else 0
    lanes = {**options, **LaneConfig(args.passes_per_step, most, args.coda_wait, compile=not args.eager).flags()}
    lanes["max_num_seqs"] = args.resident or options["max_num_seqs"]
    lanes["hf_overrides"] = {"kv_policy": args.policy}
    lanes["enable_chunked_prefill"] = not KVPolicy(args.policy, DEPTHS).overwrites
    engines = {"fixed": LLM(str(folders["plain"]), **options, enforce_eager=args.eager)}
    engines["lanes"] = LLM(str(folders["plain"]), **lanes)
    systems = ["fixed", "full", "exits", *([] if args.decode else ["prompts"])]
    if args.lora:
        engines["lora"] = LLM(str(folders["lora"]), **lanes)
        systems.append("lora")
    if args.decode:  # exits wait for the last of their token's pass: no successor takes the place that one leaves
        every = LaneConfig(args.passes_per_step, coda_wait=DEPTHS, compile=not args.eager).flags()
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
                extra_args=None if system == "fixed" else {"trace": job.trace},
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


def routed(args: argparse.Namespace, work: Path) -> None:
    """Expert-choice at R = 4 whose thresholds let about half of the tokens on at each depth, against the same with
    none leaving, in decoding."""
    options = in_process(args.requests)
    from vllm import LLM, SamplingParams

    from loopwise.serve.api.lanes import LaneConfig

    options |= LaneConfig(args.passes_per_step, coda_wait=args.coda_wait, compile=not args.eager).flags()
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

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def run(work: list[Job], tokens: int) -> float:
        began = time.perf_counter()
        for some in (work[n : n + batch] for n in range(0, len(work), batch)):
            longest = max(len(job.prompt) for job in some)
            ids = torch.tensor([[0] * (longest - len(job.prompt)) + job.prompt for job in some])
            mask = torch.tensor([[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in some])
            limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            done = model.generate(ids, attention_mask=mask, **limits)
            assert done.shape[1] == longest + tokens, "a batch ended early"
        return time.perf_counter() - began

    return run


# ---- over HTTP ----------------------------------------------------------------------------------------------------
@dataclass
class Times:
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


class Server:
    def __init__(self, folder: Path, *settings: str, flags: tuple[str, ...] = ()):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "loopwise", "serve", str(folder), f"port={self.port}", "name=m", *settings]
        command += ["--", "--max-model-len", "256", "--block-size", "32", "--max-num-batched-tokens", "2048"]
        command += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log", *flags]
        self.log = folder.parent / f"{self.port}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    async def ready(self, session: Any) -> None:
        import aiohttp

        while True:
            if self.process.poll() is not None:
                raise SystemExit(self.log.read_text()[-3000:])
            try:
                async with session.get(f"http://127.0.0.1:{self.port}/health") as reply:
                    if reply.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)

    async def ask(self, session: Any, job: Job, system: str, times: Times) -> int:
        """Stream one completion; returns its number of tokens."""
        body = {"model": "m", "prompt": job.prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if system != "fixed":
            body["trace"] = job.trace
        began, last, tokens = time.perf_counter(), 0.0, 0
        async with session.post(f"http://127.0.0.1:{self.port}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise SystemExit(await reply.text())
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                event, now = json.loads(line[6:]), time.perf_counter()
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
                elif event["choices"]:
                    if last:
                        times.between.append(now - last)
                    else:
                        times.first.append(now - began)
                    last = now
        return tokens


async def over_http(args: argparse.Namespace, folder: Path, bound: Bound) -> None:
    import aiohttp

    compiled = ("--enforce-eager",) if args.eager else ("--no-enforce-eager",)
    seats = ("--max-num-seqs", str(args.clients))
    servers = {"fixed": Server(folder, "engine=fixed", flags=(*compiled, *seats))}
    settings = [f"kv_policy={args.policy}", f"passes_per_step={args.passes_per_step}"]
    settings += [f"coda_wait={args.coda_wait}"] if args.coda_wait is not None else []
    servers["lanes"] = Server(folder, *settings, flags=(*compiled, *seats))
    try:
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)  # the server closes what idles for 5 seconds
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            for server in servers.values():
                await server.ready(session)
            await closed_loops(args, servers, session, bound)
    finally:
        for server in servers.values():
            server.process.send_signal(signal.SIGTERM)
        for server in servers.values():
            server.process.wait(60)


async def closed_loops(args: argparse.Namespace, servers: dict[str, Server], session: Any, bound: Bound) -> None:
    systems = ["fixed", "full", "exits", "prompts"]
    rates: dict[str, list[float]] = {system: [] for system in systems}
    bounds = {}
    for pair in range(args.pairs + 1):
        for system in systems:
            server = servers.get(system, servers["lanes"])
            work = jobs(random.Random(pair), args.clients * args.each, system)
            left = list(work)

            async def client(server=server, system=system, left=left) -> int:
                tokens = 0
                while left:
                    tokens += await server.ask(session, left.pop(), system, Times())
                return tokens

            began = time.perf_counter()
            tokens = sum(await asyncio.gather(*(client() for _ in range(args.clients))))
            rate = tokens / (time.perf_counter() - began)
            bounds[system] = share(bound, work)
            if pair:
                rates[system].append(rate)
        print(f"pair {pair}: " + ", ".join(f"{s} {r[-1]:.0f}" for s, r in rates.items() if r), flush=True)
    report(rates, bounds)
    capacity = statistics.median(rates["exits"]) / OUTPUT
    for load in [float(part) for part in args.load.split(",") if part]:
        await open_loop(servers["lanes"], session, load, capacity, args.seconds)


async def open_loop(server: Server, session: Any, load: float, capacity: float, seconds: float) -> None:
    """Poisson arrivals at `load` of `capacity` requests a second."""
    draw, times, tasks = random.Random(0), Times(), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        job = jobs(draw, 1, "exits")[0]
        tasks.append(asyncio.create_task(server.ask(session, job, "exits", times)))
        await asyncio.sleep(draw.expovariate(load * capacity))
    await asyncio.gather(*tasks)

    def at(values: list[float], percent: int) -> str:
        return f"{statistics.quantiles(values, n=100)[percent - 1] * 1e3:.0f} ms" if len(values) > 1 else "-"

    print(
        f"load {load:.2f} ({load * capacity:.2f} requests/s, {len(tasks)} requests): "
        f"first token p50 {at(times.first, 50)} p99 {at(times.first, 99)}; "
        f"between chunks p50 {at(times.between, 50)} p99 {at(times.between, 99)}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("where", choices=["offline", "http", "routed"])
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
    parser.add_argument("--seconds", type=float, default=30, help="http: of each load")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with tempfile.TemporaryDirectory() as work:
        if args.where == "routed":
            routed(args, Path(work))
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
