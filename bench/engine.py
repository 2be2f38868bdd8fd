"""The engine core alone, on this machine: depth-wise batching against fixed depth.

    python -m bench.engine [--shape small] [--batch 16] [--resident 16] [--mean 3] [--pairs 7] [--lora 16] [--compile]
                           [--policy single,last-exited] [--coda-wait -1] [--attention auto] [--no-graphs] [--threads 2]

A model of random weights in bfloat16 is asked for tokens whose depths are forced: a truncated geometric of the given
mean (3/8 of the most by default), in every request the same depths in an order of its own, so that all requests are
done at about the same time, as none would be under a load that goes on. Both systems are this engine, with passes of
`--batch` lanes, and answer the same requests, one after the other in every pair: at full depth, as many requests at
once, which run in lockstep; against `--resident` ones, of which those that wait to be read out take no lane. What is
printed is the median ratio of the times for decoding, its spread, and the share of the FLOP bound
(F0 + R Fr) / (F0 + E[d] Fr). Shapes are those of a
small Llama (d=1024, a core of 4 layers, 8,192 tokens, R=8), of Ouro 1.4B (R=4) and of Huginn (3.5B, R=32), and one to
try the script with. It runs on the GPU if there is one, and prints then, too, how long graphs take, and how much of a
tick the GPU waits for the host; `--attention torch` leaves the Triton kernels out, and `--no-graphs` the CUDA graphs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.model.configuration_sandwich import SandwichConfig
from loopwise.serve import Engine, Params, offline
from loopwise.serve.engine.attention.reference import TorchAttention
from loopwise.serve.params import Completion

from .figures import add


class Shape(NamedTuple):
    """A source's `layers` by part (prelude, core, coda), R, its kind, and other fields of both configs."""

    layers: tuple[int, int, int]
    depths: int
    kind: type
    source: dict[str, Any]
    fields: dict[str, Any]


def sizes(vocabulary: int, width: int, inner: int, heads: int, groups: int = 1) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": heads // groups, "head_dim": width // heads,
    }  # fmt: skip


SHAPES = {
    "tiny": Shape((1, 2, 1), 4, SandwichConfig, sizes(512, 64, 96, 4, 2), {"injection": "linear"}),
    "small": Shape((0, 4, 0), 8, LlamaConfig, sizes(8192, 1024, 2688, 16, 4), {}),
    "ouro-1.4b": Shape((0, 24, 0), 4, SandwichConfig, sizes(49152, 2048, 5632, 16), {"recurrence_norm": "between"}),
    "huginn-3.5b": Shape(
        (2, 4, 2),
        32,
        SandwichConfig,
        {**sizes(65536, 5280, 17920, 55), "norm_after_residual": True, "qk_bias": True},
        {"injection": "linear", "recurrence_norm": "last"},
    ),
}


def make(shape: Shape, lora: int, dtype: torch.dtype, device: str) -> Any:
    torch.manual_seed(0)
    layers = iter(range(sum(shape.layers)))
    parts = {
        part: [next(layers) for _ in range(n)]
        for part, n in zip(("prelude", "core", "coda"), shape.layers, strict=True)
    }
    source = shape.kind(
        num_hidden_layers=sum(shape.layers), max_position_embeddings=1024, tie_word_embeddings=False, **shape.source
    )
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    relaxation = (
        {"depths": shape.depths, "rank": dict.fromkeys(names, lora), "own": [], "dora": False} if lora else None
    )
    config = RecurrentDepthConfig(
        source_config=source, num_recurrences=shape.depths, max_recurrences=shape.depths, relaxation=relaxation,
        **parts, **shape.fields,
    )  # fmt: skip
    with torch.device(device):
        return RecurrentDepthForCausalLM(config).eval().to(device, dtype)


def parameters(*modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def geometric(mean: float, depths: int) -> torch.Tensor:
    """Weights of depths 1 .. `depths`, proportional to q^k, with this mean."""
    k = torch.arange(1, depths + 1, dtype=torch.float64)
    low, high = 1e-6, 1e3
    for _ in range(200):
        q = (low * high) ** 0.5
        low, high = (q, high) if float((q**k / (q**k).sum() * k).sum()) < mean else (low, q)
    return q**k / (q**k).sum()


def decoding(engine: Engine, prompts: list[Any], params: list[Params]) -> tuple[float, list[Completion]]:
    """Seconds for decoding, and the completions: the time of the same requests for one token is taken off."""
    began = time.perf_counter()
    done = engine.generate(prompts, params)
    whole = time.perf_counter() - began
    began = time.perf_counter()
    engine.generate(prompts, [replace(p, max_tokens=1) for p in params])
    return whole - (time.perf_counter() - began), done


def check_graphs(engine: Engine) -> None:
    """Raises SystemExit where a graph was not recorded: its passes ran without, so figures stand for others."""
    ticks = engine.loop.graph_tick
    if ticks is not None and ticks.cache.failures:
        raise SystemExit(f"{ticks.cache.failures} captures of CUDA graphs failed, and such passes ran without graphs")


class Timed:
    """A graph whose replays leave events of the GPU's clock: before and behind each."""

    def __init__(self, replay: Any, kind: str, events: list[tuple[str, Any, Any]]):
        self.replay, self.kind, self.events = replay, kind, events

    def __call__(self) -> None:
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        ends[0].record()
        self.replay()
        ends[1].record()
        self.events.append((self.kind, *ends))


def waits(engine: Engine, run: Any) -> str:
    """Time that the graphs of a run take, and share of a tick in which none runs, from the first to the last."""
    events: list[tuple[str, Any, Any]] = []
    ticks = engine.loop.graph_tick
    if ticks is None:
        return "no graphs of whole ticks"
    plain = ticks.replays
    ticks.replays = {key: Timed(replay, key[0], events) for key, replay in plain.items()}
    run()
    torch.cuda.synchronize()
    ticks.replays = plain
    took: dict[str, list[float]] = {"pass": [], "read": []}
    for kind, start, end in events:
        took[kind].append(start.elapsed_time(end))
    whole = events[0][1].elapsed_time(events[-1][2])
    idle = whole - sum(map(sum, took.values()))
    graphs = ", ".join(f"{len(ms)} of a {kind}, {statistics.median(ms):.3f} ms" for kind, ms in took.items() if ms)
    return f"graphs: {graphs}; the GPU waits {1e3 * idle / len(took['pass']):.1f} us a tick ({idle / whole:.2%})"


def profiled(run: Any) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return profile.key_averages().table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=70)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--attention", choices=["auto", "torch"], default="auto")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--resident", type=int, default=0, help="default: as many as --batch")
    parser.add_argument("--requests", type=int, default=0, help="default: as many as --resident")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--passes-per-step", "--ticks", type=int, default=256)
    parser.add_argument("--mean", type=float)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--policy", default="single,last-exited")
    parser.add_argument("--coda-wait", type=int, help="default: measured")
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    shape = SHAPES[args.shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.attention == "torch":
        offline.attention_for = lambda device: TorchAttention
    mean = args.mean or 3 / 8 * shape.depths
    weights = geometric(mean, shape.depths)
    resident = args.resident or args.batch
    spread = torch.multinomial(weights, args.tokens - 1, True, generator=generator) + 1
    mean = float(spread.double().mean())
    prompts, forced, fixed = [], [], []
    for _ in range(args.requests or resident):
        length = int(torch.randint(16, 48, (1,), generator=generator))
        prompts.append(torch.randint(0, shape.source["vocab_size"], (length,), generator=generator).tolist())
        depths = spread[torch.randperm(len(spread), generator=generator)].tolist()
        forced.append(Params(args.tokens, ignore_eos=True, trace=(*[shape.depths] * length, *depths)))
        fixed.append(Params(args.tokens, ignore_eos=True))
    for policy in args.policy.split(","):
        began = time.perf_counter()
        model = make(shape, args.lora, torch.bfloat16, device)
        core = parameters(model.core, model.injection)
        once = parameters(model.prelude, model.coda, model.get_output_embeddings())
        bound = (once + shape.depths * core) / (once + mean * core)
        engine = Engine(
            model, max_num_seqs=resident, max_model_len=48 + args.tokens, kv_policy=policy, max_lanes=args.batch,
            passes_per_step=args.passes_per_step, max_num_batched_tokens=48 * resident, coda_wait=args.coda_wait,
            compile=args.compile, cuda_graphs=not args.no_graphs,
        )  # fmt: skip
        ready = time.perf_counter() - began

        def run(params: list[Params], at_once: int, engine: Engine = engine) -> float:
            began = time.perf_counter()
            for n in range(0, len(params), at_once):
                engine.generate(prompts[n : n + at_once], params[n : n + at_once])
            return time.perf_counter() - began

        def decode(params: list[Params], at_once: int, run: Any = run) -> float:
            """Seconds for decoding: the same prompts for one token are taken off."""
            return run(params, at_once) - run([replace(p, max_tokens=1) for p in params], at_once)

        systems = (fixed, args.batch), (forced, resident)
        for system in systems:
            decode(*system)
        print(f"    the engine is ready in {ready:.0f} s, warm in {time.perf_counter() - began:.0f} s", flush=True)
        times = [[decode(*system) for system in systems] for _ in range(args.pairs)]
        ratios = [a / b for a, b in times]
        backend, ratio = type(engine.loop.forward.attention).__name__, statistics.median(ratios)
        around, rate = f"{min(ratios):.3f} to {max(ratios):.3f}", statistics.median(b for _, b in times)
        print(
            f"{args.shape}, {device}, {backend}, {policy}: {ratio:.3f}x of fixed depth ({around}), E[d] {mean:.3f}, "
            f"bound {bound:.3f}, share {ratio / bound:.1%}; {len(prompts) * len(spread) / rate:.0f} tokens/s",
            flush=True,
        )
        add(f"{args.shape}, {policy}: exits against fixed depth", ratio, "x", spread=around, bound=round(bound, 3))
        if device == "cuda":
            for name, system in zip(("fixed", "mixed"), systems, strict=True):
                again = lambda run=run, system=system: run(*system)  # noqa: E731
                print(f"    {name}: {waits(engine, again)}", flush=True)
                if args.profile:
                    print(profiled(again), flush=True)
        del engine, model


if __name__ == "__main__":
    main()
