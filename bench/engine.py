"""The engine core alone, on this machine: depth-wise batching against fixed depth.

    python bench/engine.py [--shape small] [--batch 16] [--mean 3] [--pairs 7] [--policy single,last-exited] [--lora 16]
                           [--attention auto] [--threads 2]

A model of random weights in bfloat16 is asked for tokens whose depths are forced: a truncated geometric of the given
mean (3/8 of the most by default). All systems run the same requests, one after the other in every pair; what is printed
is the median ratio, its spread, and the share of the FLOP bound (F0 + R Fr) / (F0 + E[d] Fr). Shapes are those of a
small Llama (d=1024, a core of 4 layers, 8,192 tokens, R=8), of Ouro 1.4B (R=4) and of Huginn (3.5B, R=32), and one to
try the script with. It runs on the GPU if there is one, and prints then, too, how much of a tick the GPU idles, waiting
for the host; `--attention torch` leaves the Triton kernels out, and `--no-graphs` the CUDA graphs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.model.configuration_sandwich import SandwichConfig
from loopwise.serve import Engine, Params, offline
from loopwise.serve.engine.attention import TorchAttention


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


def gap(engine: Engine, run: Any) -> tuple[float, float]:
    """Milliseconds of a tick, and those of them in which the GPU has nothing to do, while `run` runs the engine."""
    ticks = -sum(engine.loop.counts.passes.values())
    torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
        whole = time.perf_counter() - began
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
    ticks += sum(engine.loop.counts.passes.values())
    return 1e3 * whole / ticks, 1e3 * (whole - busy) / ticks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--attention", choices=["auto", "torch"], default="auto")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--mean", type=float)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--policy", default="single,last-exited")
    parser.add_argument("--coda-wait", type=int, default=0)
    parser.add_argument("--lora", type=int, default=0)
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
    prompts, forced, fixed = [], [], []
    for _ in range(args.requests):
        length, out = (int(torch.randint(a, b, (1,), generator=generator)) for a, b in ((16, 48), (24, 48)))
        prompts.append(torch.randint(0, shape.source["vocab_size"], (length,), generator=generator).tolist())
        depths = (torch.multinomial(weights, out, True, generator=generator) + 1).tolist()
        forced.append(Params(max_tokens=out, ignore_eos=True, trace=(*[shape.depths] * length, *depths)))
        fixed.append(Params(max_tokens=out, ignore_eos=True))
    for policy in args.policy.split(","):
        model = make(shape, args.lora, torch.bfloat16, device)
        options = {"rows": args.batch, "length": 128, "kv_policy": policy, "coda_wait": args.coda_wait}
        engine = Engine(model, **options, cuda_graphs=not args.no_graphs)
        core = parameters(model.core, model.injection)
        once = parameters(model.prelude, model.coda, model.get_output_embeddings())
        bound = (once + shape.depths * core) / (once + mean * core)

        def decode(params: list[Params], engine: Engine = engine) -> float:
            """Seconds for decoding: the same prompts for one token are taken off."""
            seconds = []
            for some in (params, [Params(max_tokens=1, ignore_eos=True, trace=p.trace) for p in params]):
                began = time.perf_counter()
                engine.generate(prompts, some)
                seconds.append(time.perf_counter() - began)
            return seconds[0] - seconds[1]

        decode(forced[:8] + forced[8:])
        ratios = []
        for _ in range(args.pairs):
            ratios.append(decode(fixed) / decode(forced))
        backend, ratio = type(engine.loop.attention).__name__, statistics.median(ratios)
        print(
            f"{args.shape}, {device}, {backend}, {policy}: {ratio:.2f}x of fixed depth ({min(ratios):.2f} to "
            f"{max(ratios):.2f}), bound {bound:.2f}, share {ratio / bound:.1%}"
        )
        if device == "cuda":
            tick, idle = gap(engine, lambda engine=engine: engine.generate(prompts, forced))
            print(f"    a tick takes {tick:.2f} ms; {idle:.2f} ms of it the GPU idles ({idle / tick:.0%})")


if __name__ == "__main__":
    main()
