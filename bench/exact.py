"""Is the text the same on this device? Kernels and graphs against torch operations, waves against plain decoding.

    python -m bench.exact [--shape small] [--requests 16] [--tokens 640] [--policy per-depth,last-exited,single]
                          [--width 4] [--budget 0]

A model of random weights, whose logits lie as close together as any model's. In float32, every policy is run by the
device's own attention and graphs and by torch operations alone: equal text is expected, greedy and sampled. In
bfloat16, waves are compared with plain decoding by the same engine. A product of matrices rounds by its number of rows,
so all passes and read-outs of both have as many as those of the waves take; a server pads plain requests to fewer.
Equal text is expected then, and is counted token by token. With `--budget`, passes have that many rows, and lanes of
waves wait. Without a GPU, the functions run that a GPU records as graphs.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from loopwise.serve import Engine, Params, offline
from loopwise.serve.engine.attention.reference import TorchAttention
from loopwise.serve.engine.graph_tick import Sizes
from loopwise.serve.engine.graphs import padded

from .engine import SHAPES, check_graphs, make
from .figures import add
from .graphs import call

SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}


def texts(engine: Engine, prompts: list[list[int]], params: Params) -> list[tuple[int, ...]]:
    """The tokens of each prompt; request n has seed n."""
    asked = [replace(params, seed=n) for n in range(len(prompts))]
    return [tuple(done.tokens) for done in engine.generate(prompts, asked)]


def same(ours: list[tuple[int, ...]], theirs: list[tuple[int, ...]]) -> tuple[int, int, int]:
    """Equal texts; tokens before a text's first difference; tokens in all."""
    equal, before, total = 0, 0, 0
    for a, b in zip(ours, theirs, strict=True):
        first = next((n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        equal, before, total = equal + (first == len(a)), before + first, total + len(a)
    return equal, before, total


def tell(what: str, ours: list[tuple[int, ...]], theirs: list[tuple[int, ...]]) -> bool:
    """Print and note how far texts agree. Returns whether they do whole."""
    equal, before, total = same(ours, theirs)
    print(f"{what}: {equal} of {len(ours)} texts equal, {before} of {total} tokens before a difference", flush=True)
    add(what, f"{equal} of {len(ours)}", "texts equal", tokens=f"{before} of {total}")
    return equal == len(ours)


def kernels(args: argparse.Namespace, policy: str, prompts: list[list[int]], params: dict[str, Params]) -> bool:
    """The device's attention and graphs against torch operations, in float32."""
    found: list[dict[str, list[tuple[int, ...]]]] = []
    own = offline.attention_for
    for graphs in (True, False):
        offline.attention_for = own if graphs else lambda device: TorchAttention
        engine = build(args, torch.float32, kv_policy=policy, cuda_graphs=graphs)
        name = type(engine.loop.forward.attention).__name__
        found.append({kind: texts(engine, prompts, each) for kind, each in params.items()})
        check_graphs(engine)
        del engine
        if graphs and name == "TorchAttention":
            print(f"{policy}: this device has no attention kernels and no graphs", flush=True)
            add(f"{policy}: kernels and graphs against torch", "not run", why="this device has neither")
            return True
    offline.attention_for = own
    agree = [tell(f"{policy}, {kind}: {name} against torch", found[0][kind], found[1][kind]) for kind in params]
    return all(agree)


def waves(args: argparse.Namespace, policy: str, prompts: list[list[int]], params: dict[str, Params]) -> bool:
    """Waves against plain decoding in one engine, in bfloat16, by passes of one width."""
    engine = build(args, torch.bfloat16, kv_policy=policy, max_in_flight=args.width, budget=args.budget)
    rows = fix_sizes(engine, args.requests, args.width)
    whole = True
    for kind, each in params.items():
        wave = replace(each, decoder="wave", max_in_flight=args.width)
        whole &= tell(
            f"{policy}, {kind}, bfloat16, passes of {rows} rows: waves against plain decoding",
            texts(engine, prompts, wave),
            texts(engine, prompts, each),
        )
    check_graphs(engine)
    return whole


def fix_sizes(engine: Engine, requests: int, width: int) -> int:
    """Give all graphs of `engine` the sizes that so many waves of `width` have. Returns the rows of a pass.

    Raises SystemExit for more rows than graphs have.
    """
    if engine.loop.graph_tick is None:
        with torch.inference_mode():
            engine._record(call)
    ticks: Any = engine.loop.graph_tick
    lanes, budget = requests * width, engine.loop.eager_tick.budget
    room = min(lanes, max(budget, requests)) if budget else lanes
    sizes = Sizes(padded(room), lanes > padded(room), padded(lanes), padded(requests))
    if sizes.reads > ticks.cache.max_rows:
        raise SystemExit(f"{requests} waves of {width}: graphs have at most {ticks.cache.max_rows} rows")
    ticks.sizes = lambda *_: sizes
    return sizes.width


def build(args: argparse.Namespace, dtype: torch.dtype, **options: Any) -> Engine:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    room = 48 + args.tokens
    return Engine(
        make(SHAPES[args.shape], 0, dtype, device),
        max_num_seqs=args.requests,
        max_model_len=room,
        max_num_batched_tokens=48 * args.requests,
        passes_per_step=64,
        **options,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.exact", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=640, help="of each request; 16 of 640 are 10,240")
    parser.add_argument("--policy", default="per-depth,last-exited,single")
    parser.add_argument("--width", type=int, default=4, help="positions of a wave in flight")
    parser.add_argument("--budget", type=int, default=0, help="rows of passes that have no room for all; 0: all have")
    args = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[args.shape].source["vocab_size"]
    lengths = torch.randint(4, 48, (args.requests,), generator=draw).tolist()
    prompts = [torch.randint(0, vocabulary, (length,), generator=draw).tolist() for length in lengths]
    plain = Params(args.tokens, ignore_eos=True, temperature=0.0, exit_rule="fixed")
    params = {"greedy": plain, "sampled": replace(plain, **SAMPLED)}
    short = {kind: replace(each, max_tokens=min(args.tokens, 64)) for kind, each in params.items()}
    results = [kernels(args, policy, prompts, short) for policy in args.policy.split(",")]
    results += [waves(args, policy, prompts, params) for policy in args.policy.split(",") if policy != "single"]
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
