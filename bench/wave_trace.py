"""Schedules of self-speculation, simulated on the drafts of a trained model; those of waves are run, too.

    python -m bench.wave_trace MODEL [--prompts FILE] [--tokens 64] [--recurrences R] [--temperature 0] [--cost 1]
                               [--pairs 3] [--threads 2]

A trace has the draft of every generated position at every depth, given the right tokens before it. t is the depth from
which the draft is the token. Simulated on it, one request at a time: waves (draft_every=K, draft_depths=D), LoopSpec
(arXiv 2609.17184: a draft after K recurrences, another after K X, a check at R) and WaveFront Decoding (2609.23033: one
draft depth T_d, a check at R). The last two are these papers' schedules on our traces, never their figures. Beside the
simulated passes of a wave stand those that the engine took, and whether its text is that of plain decoding.

Two speed-ups follow from a schedule. One is in a model in which a pass of some lanes takes as long as one of one, and a
read-out as long as `--cost` passes. The other is predicted for this machine, by the engine's own measurement of passes
and read-outs at every number of lanes (`Loop.measure`), which leaves out the host's part of a tick. Those of waves are
measured, too: time of decoding against plain decoding, in interleaved pairs. Through a coda, drafts of the trace read
its keys of their own depth.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loopwise.load import read_model
from loopwise.serve import Engine, Params
from loopwise.serve.engine.costs import Costs
from loopwise.serve.engine.sampling import sample, waiting_times
from loopwise.serve.params import Completion

from .engine import check_graphs, decoding
from .figures import add

PROMPTS = [
    "q=b;k=m;b=7;t=q;a=2;m=a;z=t;c=4;y=z;h=c;?y=", "q=b;k=m;b=7;", "a=3;b=a;c=b;d=c;?d=", "x=5;y=x;z=y;?z=5;?x=",
]  # fmt: skip
Trace = list[list[int]]  # of each position: its drafts at depths 1 to R, of which the last is its token


class Spent(NamedTuple):
    """The work for one token: passes of the core, calls of a read-out, lanes in passes, lanes in read-outs."""

    passes: float
    reads: float
    lanes: float
    read_lanes: float


def settles(drafts: list[int]) -> int:
    """t: the depth from which the drafts are the last of them."""
    return next(t for t in range(1, len(drafts) + 1) if all(draft == drafts[-1] for draft in drafts[t - 1 :]))


@torch.no_grad()
def traced(model: Any, prompt: list[int], tokens: list[int], depth: int, temperature: float, seed: int) -> Trace:
    """The drafts of the positions that gave `tokens` after `prompt`, by the noise with which the engine samples."""
    ids = torch.tensor([prompt + tokens], device=model.device)
    out = model(ids, num_recurrences=depth, output_depth_logits=True, use_cache=False)
    logits = out.depth_logits[:, 0, len(prompt) - 1 : -1].cpu()  # [R, n, V]
    best = logits.argmax(-1)
    if temperature:
        position = torch.arange(len(prompt), len(prompt) + len(tokens))
        noise = waiting_times(torch.full_like(position, seed), torch.zeros_like(position), position, logits.shape[-1])
        each, zero = torch.full((len(tokens),), temperature, dtype=torch.double), torch.zeros(len(tokens))
        best = torch.stack(
            [
                sample(of, top, each, zero.long(), zero + 1, zero, noise, cut=False)
                for of, top in zip(logits, best, strict=True)
            ]
        )
    return best.T.tolist()


def wave(trace: Trace, depths: set[int], every: int, width: int) -> Spent:
    """A wave, pass by pass. depths: where a position drafts.   every: passes between read-outs."""
    end = len(trace[0])
    flying: list[list[Any]] = [[0, 0, None, True, False]]  # position, depth, draft, started rightly, waits
    out = passes = reads = lanes = read_lanes = since = 0
    while out < len(trace):
        for lane in flying:
            lanes += lane[1] < end
            lane[1] += lane[1] < end
            lane[4] |= lane[1] in depths or lane[1] == end
        passes, since = passes + 1, since + 1
        if since < every or not any(lane[4] for lane in flying):
            continue
        reads, since = reads + 1, 0
        for n, lane in enumerate(flying):
            if not lane[4]:
                continue
            read_lanes, lane[4] = read_lanes + 1, False
            draft = trace[lane[0]][lane[1] - 1] if lane[3] else lane[2] or 0  # beside the text, no draft changes
            if draft != lane[2]:
                del flying[n + 1 :]
            lane[2] = draft
        while flying and flying[0][1] == end and flying[0][2] is not None and not flying[0][4]:
            last = flying.pop(0)
            out += 1
        position = flying[-1][0] + 1 if flying else out
        before = flying[-1] if flying else last
        if before[2] is not None and position < len(trace) and len(flying) < width:
            flying.append([position, 0, None, before[3] and before[2] == trace[before[0]][-1], False])
    return Spent(*(each / len(trace) for each in (passes, reads, lanes, read_lanes)))


def loopspec(trace: Trace, every: int, second: int) -> Spent:
    """LoopSpec K:X, by its paper's account: a token costs 1, X or R / K cycles of K passes and a read-out, where its
    first draft is right, else its second, else neither. X = 0: no second draft."""
    end = len(trace[0])
    cycles = 0
    for drafts in trace:
        first, other = drafts[every - 1], drafts[min(every * second, end) - 1] if second else None
        cycles += 1 if first == drafts[-1] else second if other == drafts[-1] else -(-end // every)
    each = cycles / len(trace)
    return Spent(every * each, each, end * each, each * -(-end // every))


def schedules(depth: int) -> dict[str, tuple[set[int], int, dict[str, Any]]]:
    """By name: depths of drafts, passes between read-outs, and fields of the request."""
    found: dict[str, tuple[set[int], int, dict[str, Any]]] = {}
    for every in (k for k in (1, 2, 4, 8) if k < depth):
        at = set(range(every, depth + 1, every))
        found[f"wave, draft_every={every}"] = at, every, {"draft_every": every}
    powers = tuple(2**n for n in range(6) if 2**n < depth)
    found[f"wave, draft_depths={','.join(map(str, powers))}"] = {*powers}, powers[0], {"draft_depths": powers}
    for at in (k for k in (1, 2, 4) if k < depth):
        found[f"WaveFront's schedule, T_d={at}"] = {at}, at, {"draft_depths": (at,)}
    return found


def seconds(spent: Spent, costs: Costs) -> float:
    """Time of a token, by `costs` at the mean number of lanes."""
    return spent.passes * costs.of_pass(spent.lanes / spent.passes) + spent.reads * costs.of_read(
        spent.read_lanes / spent.reads
    )


def timed(
    engine: Engine, prompts: list[Any], kinds: dict[str, Params], pairs: int
) -> dict[str, tuple[list[float], list[Completion]]]:
    """Seconds of decoding by kind in each of `pairs`, one after the other in every pair, and the completions."""
    found: dict[str, tuple[list[float], list[Completion]]] = {}
    for pair in range(pairs + 1):
        for kind, params in kinds.items():
            took, done = decoding(engine, prompts, [params] * len(prompts))
            before = found[kind][0] if pair > 1 else []  # the first pair warms up
            found[kind] = [*before, took], done
    return found


def mean(spent: list[Spent], tokens: list[int]) -> Spent:
    return Spent(*(sum(s[n] * t for s, t in zip(spent, tokens, strict=True)) / sum(tokens) for n in range(4)))


def compare(
    engine: Engine, model: Any, prompts: list[Any], params: Params, cost: float, pairs: int = 0
) -> dict[str, Any]:
    """Trace plain decoding, simulate every schedule on it, run those of waves, and time them in so many `pairs`.

    `model` is the engine's, loaded anew.
    """
    depth = params.num_recurrences or engine.config.num_recurrences
    costs, plans = engine.loop.measure(), schedules(depth)
    waves = {
        name: replace(params, decoder="wave", max_in_flight="auto", **fields) for name, (*_, fields) in plans.items()
    }
    runs = timed(engine, prompts, {"plain": params, **waves}, pairs)
    base, plain = runs["plain"]
    ids, args = [engine._ids(prompt) for prompt in prompts], (depth, params.temperature or 0.0, params.seed)
    traces = [traced(model, i, done.tokens, *args) for i, done in zip(ids, plain, strict=True)]
    sizes, width = [len(trace) for trace in traces], engine.loop.config.max_in_flight
    settled = Counter(settles(drafts) for trace in traces for drafts in trace)
    rows: list[dict[str, Any]] = []
    for name, (depths, every, _) in plans.items():
        spent = mean([wave(trace, depths, every, width) for trace in traces], sizes)
        took, done = runs[name]
        row: dict[str, Any] = {"schedule": name, **spent._asdict()}
        row["measured_passes"] = sum(each.passes for each in done) / sum(len(each.tokens) - 1 for each in done)
        row["same_text"] = [each.tokens for each in done] == [each.tokens for each in plain]
        if pairs:
            row["measured_speedups"] = [a / b for a, b in zip(base, took, strict=True)]
        rows.append(row)
    for every, second in ((1, 0), (1, 2), (2, 0), (2, 2), (4, 0)):
        if every * max(second, 1) < depth:
            name = f"LoopSpec's schedule, {every}" + (f":{second}" if second else "")
            rows.append({"schedule": name, **mean([loopspec(t, every, second) for t in traces], sizes)._asdict()})
    alone = Spent(depth, 1, depth, 1)
    for row in rows:
        row["simulated_speedup"] = (depth + cost) / (row["passes"] + cost * row["reads"])
        spent = Spent(*(row[field] for field in Spent._fields))
        row["predicted_speedup"] = seconds(alone, costs) / seconds(spent, costs)
    share = {t: settled[t] / sum(sizes) for t in range(1, depth + 1)}
    found: dict[str, Any] = {"recurrences": depth, "tokens": sum(sizes), "share_by_t": share, "schedules": rows}
    found["mean_t"] = sum(t * part for t, part in share.items())
    found["plain_seconds"] = {"predicted": seconds(alone, costs)}
    if pairs:
        found["plain_seconds"]["measured"] = statistics.median(base) / sum(size - 1 for size in sizes)
    return found


def printed(found: dict[str, Any], cost: float) -> None:
    print(f"R = {found['recurrences']}, {found['tokens']} tokens, mean t {found['mean_t']:.2f}. Share by t:")
    print("  " + "  ".join(f"{t}: {share:.3f}" for t, share in found["share_by_t"].items()))
    print(f"Simulated, a token (speed-up where a read-out costs {cost:g} passes); passes of the engine beside them:")
    for row in found["schedules"]:
        line = f"  {row['schedule']:34} {row['passes']:6.2f} passes  {row['lanes']:6.2f} lanes  {row['reads']:5.2f} "
        line += f"read-outs of {row['read_lanes']:5.2f} lanes  {row['simulated_speedup']:5.2f}x"
        if "same_text" in row:
            line += f"  engine {row['measured_passes']:6.2f}, same text: {row['same_text']}"
        print(line)
    times = ", ".join(f"{value * 1e3:.2f} ms {how}" for how, value in found["plain_seconds"].items())
    print(f"Speed-up by the measured costs of passes and read-outs (plain decoding of a token: {times}):")
    for row in found["schedules"]:
        line = f"  {row['schedule']:34} {row['predicted_speedup']:5.2f}x predicted"
        if each := row.get("measured_speedups"):
            middle, spread = statistics.median(each), f"{min(each):.2f} to {max(each):.2f}"
            share = middle / row["predicted_speedup"]
            line += f", {middle:.2f}x measured ({spread}), {share:.1%} of it"
            facts = {"spread": spread, "predicted": round(row["predicted_speedup"], 3), "same text": row["same_text"]}
            add(f"{row['schedule']}, R={found['recurrences']}: against plain decoding", middle, "x", **facts)
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, help="file with a prompt in every line")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--recurrences", type=int)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--cost", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=3, help="timed runs of each decoder; 0: nothing is timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompts = args.prompts.read_text().splitlines() if args.prompts else PROMPTS
    engine = Engine(
        args.model, max_num_seqs=1, max_in_flight="auto", dtype="float32", max_recurrences=args.recurrences,
        kv_policy="per-depth",
    )  # fmt: skip
    params = Params(
        args.tokens, args.recurrences, ignore_eos=True, temperature=args.temperature, seed=1, exit_rule="fixed"
    )
    model = read_model(args.model, dtype="float32").to(engine.model.device).eval()
    found = compare(engine, model, prompts, params, args.cost, args.pairs)
    check_graphs(engine)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        printed(found, args.cost)


if __name__ == "__main__":
    main()
