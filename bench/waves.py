"""Waves against plain decoding on one engine, with forced drafts: the timings are complete, the text is not.

    python -m bench.waves [--shape small] [--recurrences 32] [--batch 1,4,16] [--profile hard,mid,easy]
                          [--every auto,1,2,4] [--tokens 64] [--pairs 3] [--ordinary 0.5] [--budget auto]
                          [--compile] [--threads 2]

A model of random weights. A table says at which depth the draft of each position becomes right; prelude, core, coda,
head and sampling run as for any model, then the token is replaced by the right one, or by a wrong one. The chance that
a draft is right from depth 1, 2, 4, 8 or 16 on is that of the profile. Measured is decoding alone, in interleaved
pairs: what one token takes is taken off. Waves share as many lanes of a pass as the engine finds to add little time, as
those of a server do (`--budget`). With `--ordinary`, that share of the requests is decoded plainly beside the waves,
and their tokens count, too.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any

import torch

from loopwise.serve import Engine, Params
from loopwise.serve.engine.decoders.cadence import Cadence

from .engine import SHAPES, check_graphs, decoding, make
from .figures import add

# Chance that t, the depth from which a draft is right, is at most a depth; for R = 4 and for R = 32.
PROFILES: dict[str, dict[int, dict[int, float]]] = {
    "hard": {4: {1: 0.50, 2: 0.80, 3: 0.92}, 32: {1: 0.50, 2: 0.66, 4: 0.80, 8: 0.90, 16: 0.96}},
    "mid": {4: {1: 0.62, 2: 0.88, 3: 0.96}, 32: {1: 0.65, 2: 0.82, 4: 0.92, 8: 0.965, 16: 0.987}},
    "easy": {4: {1: 0.75, 2: 0.95, 3: 0.985}, 32: {1: 0.80, 2: 0.93, 4: 0.97, 8: 0.987, 16: 0.995}},
}
RIGHT, WRONG, PROMPT = 7, 8, 16  # tokens, and the length of a prompt


def settling(profile: str, depths: int, count: int, seed: int) -> torch.Tensor:
    """Depths t [count] from which drafts are right, drawn by `profile`; evenly between its depths."""
    chances = PROFILES[profile][4 if depths <= 4 else 32]
    steps = [(0, 0.0), *((depth, chance) for depth, chance in chances.items() if depth < depths), (depths, 1.0)]
    at, by = torch.tensor([d for d, _ in steps], dtype=torch.double), torch.tensor([c for _, c in steps])
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed)).double()
    upper = torch.searchsorted(by.double(), draw).clamp(1, len(steps) - 1)
    low, high = at[upper - 1], at[upper]
    part = (draw - by[upper - 1]) / (by[upper] - by[upper - 1])
    return (low + part * (high - low)).ceil().clamp(1, depths).long()


class Forced:
    """A sampler that does its work, and gives the right token where the table says so.

    settles [rows, positions]: the depth from which the draft for a position is right.
    """

    def __init__(self, inner: Any, state: Any, settles: torch.Tensor):
        self.inner, self.state, self.settles = inner, state, settles

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, logits: Any, best: Any, row: torch.Tensor, position: torch.Tensor, **more: Any) -> torch.Tensor:
        tokens = self.inner(logits, best, row, position, **more)
        lane = self.state.lane_of(row, position - 1)
        row = row.clamp(max=len(self.settles) - 1)  # a graph's spare row
        right = self.state.lanes.depth[lane] >= self.settles[row, position]
        return torch.where(right | (position <= PROMPT), torch.full_like(tokens, RIGHT), torch.full_like(tokens, WRONG))


def seconds(engine: Engine, params: list[Params]) -> float:
    """Time for decoding these requests, whose tokens are all the right one."""
    prompts = [[5 + n % 90] * PROMPT for n in range(len(params))]
    took, done = decoding(engine, prompts, params)
    assert all(tuple(one.tokens) == (RIGHT,) * p.max_tokens for one, p in zip(done, params, strict=True)), (
        "a token is not the right one"
    )
    return took


def forget(engine: Engine) -> None:
    """Let `draft_every=auto` learn the next profile without the drafts of the one before."""
    loop = engine.loop
    loop.cadence = Cadence(loop.state, loop.work, loop.schedule)


def measure(args: argparse.Namespace, batch: int, device: str) -> None:
    """Every profile and cadence at one batch."""
    shape = SHAPES[args.shape]
    depths = args.recurrences or shape.depths
    model = make(shape._replace(depths=depths), 0, torch.bfloat16, device)
    engine = Engine(
        model,
        max_num_seqs=batch,
        max_model_len=PROMPT + args.tokens + 1,
        kv_policy="per-depth",
        max_in_flight="auto",
        budget=args.budget,
        passes_per_step=64,
        compile=args.compile,
        coda_wait="auto",
    )
    context = engine.loop.context
    table = torch.ones(batch, PROMPT + args.tokens + 2, dtype=torch.long, device=engine.loop.state.device)
    context.sampler = Forced(context.sampler, engine.loop.state, table)
    # Drawn, as the argmax alone asks no sampler.
    plain = Params(args.tokens, depths, ignore_eos=True, exit_rule="fixed", temperature=1.0)
    waves = {every: replace(plain, decoder="wave", max_in_flight="auto", draft_every=every) for every in args.every}
    ordinary, lanes = round(args.ordinary * batch), engine.loop.eager_tick.budget
    for profile in args.profile:
        forget(engine)
        table.copy_(settling(profile, depths, table.numel(), 0).view(table.shape))
        base: list[float] = []
        took: dict[Any, list[float]] = {every: [] for every in waves}
        for pair in range(args.pairs + 1):
            base.append(seconds(engine, [plain] * batch))
            for every, params in waves.items():
                took[every].append(seconds(engine, [plain] * ordinary + [params] * (batch - ordinary)))
            if pair == 0:  # it warms up
                base.clear()
                took = {every: [] for every in waves}
        for every, each in took.items():
            ratios = [a / b for a, b in zip(base, each, strict=True)]
            ratio, spread = statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
            beside = f", {ordinary} of them plain" if ordinary else ""
            what = f"{args.shape}, R={depths}, batch {batch}{beside}, forced profile {profile}, draft_every={every}"
            print(f"{what}, budget={lanes}: {ratio:.2f}x plain decoding ({spread})", flush=True)
            add(f"timings complete, text is not: {what}", ratio, "x", spread=spread, budget=lanes)
    check_graphs(engine)


def auto_or_number(text: str) -> Any:
    return text if text == "auto" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.waves", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--recurrences", type=int, default=0, help="default: the shape's")
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--profile", default="hard,mid,easy")
    parser.add_argument("--every", default="auto,1,2,4", help="draft_every of the waves")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--ordinary", type=float, default=0.0, help="share of the requests that is decoded plainly")
    parser.add_argument("--budget", type=auto_or_number, default="auto", help="lanes that waves may fill; 0: no bound")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.profile, args.every = args.profile.split(","), [auto_or_number(word) for word in args.every.split(",")]
    torch.set_num_threads(args.threads)
    for batch in map(int, args.batch.split(",")):
        measure(args, batch, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
