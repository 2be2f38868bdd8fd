"""Schedules of self-speculation, simulated on the drafts of a trained model; those of waves are run, too.

    python -m bench.wave_trace MODEL [--prompts FILE] [--tokens 64] [--recurrences R] [--temperature 0] [--cost 1]

A trace has the draft of every generated position at every depth, given the right tokens before it. t is the depth from
which the draft is the token. Simulated on it, one request at a time: waves (draft_every=K, draft_depths=D), LoopSpec
(arXiv 2609.17184: a draft after K recurrences, another after K X, a check at R) and WaveFront Decoding (2609.23033: one
draft depth T_d, a check at R). The last two are these papers' schedules on our traces, never their figures. Beside the
simulated passes of a wave stand those that the engine took, and whether its text is that of plain decoding.
`--cost`: time of a read-out in passes, for speed-ups in a model in which a pass of some lanes takes as long as one of
one. Through a coda, drafts of the trace read its keys of their own depth.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loopwise.load import read_model
from loopwise.serve import Engine, Params
from loopwise.serve.engine.sampling import sample, waiting_times

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
    ids = torch.tensor([prompt + tokens])
    out = model(ids, num_recurrences=depth, output_depth_logits=True, use_cache=False)
    logits = out.depth_logits[:, 0, len(prompt) - 1 : -1]  # [R, n, V]
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
            lane[1] += lane[1] < end
            lane[4] |= lane[1] in depths or lane[1] == end
            lanes += 1
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


def mean(spent: list[Spent], tokens: list[int]) -> Spent:
    return Spent(*(sum(s[n] * t for s, t in zip(spent, tokens, strict=True)) / sum(tokens) for n in range(4)))


def compare(engine: Engine, model: Any, prompts: list[Any], params: Params, cost: float) -> dict[str, Any]:
    """Trace plain decoding, simulate every schedule on it, run those of waves. `model` is the engine's, loaded anew."""
    depth = params.num_recurrences or engine.config.num_recurrences
    ids, plain = [engine._ids(prompt) for prompt in prompts], engine.generate(prompts, params)
    args = depth, params.temperature or 0.0, params.seed
    traces = [traced(model, i, done.tokens, *args) for i, done in zip(ids, plain, strict=True)]
    sizes, width = [len(trace) for trace in traces], engine.loop.config.max_in_flight
    settled = Counter(settles(drafts) for trace in traces for drafts in trace)
    rows = []
    for name, (depths, every, fields) in schedules(depth).items():
        spent = mean([wave(trace, depths, every, width) for trace in traces], sizes)
        engine.loop.counts.reads.clear()
        done = engine.generate(prompts, replace(params, decoder="wave", max_in_flight="auto", **fields))
        measured = sum(each.passes for each in done) / sum(len(each.tokens) - 1 for each in done)
        same = [each.tokens for each in done] == [each.tokens for each in plain]
        rows.append({"schedule": name, **spent._asdict(), "measured_passes": measured, "same_text": same})
    for every, second in ((1, 0), (1, 2), (2, 0), (2, 2), (4, 0)):
        if every * max(second, 1) < depth:
            name = f"LoopSpec's schedule, {every}" + (f":{second}" if second else "")
            rows.append({"schedule": name, **mean([loopspec(t, every, second) for t in traces], sizes)._asdict()})
    for row in rows:
        row["simulated_speedup"] = (depth + cost) / (row["passes"] + cost * row["reads"])
    share = {t: settled[t] / sum(sizes) for t in range(1, depth + 1)}
    mean_t = sum(t * part for t, part in share.items())
    return {"recurrences": depth, "tokens": sum(sizes), "share_by_t": share, "mean_t": mean_t, "schedules": rows}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, help="file with a prompt in every line")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--recurrences", type=int)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--cost", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    prompts = args.prompts.read_text().splitlines() if args.prompts else PROMPTS
    engine = Engine(
        args.model, max_num_seqs=1, max_in_flight="auto", dtype="float32", max_recurrences=args.recurrences,
        kv_policy="per-depth",
    )  # fmt: skip
    params = Params(
        args.tokens, args.recurrences, ignore_eos=True, temperature=args.temperature, seed=1, exit_rule="fixed"
    )
    found = compare(engine, read_model(args.model, dtype="float32").eval(), prompts, params, args.cost)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        printed(found, args.cost)


if __name__ == "__main__":
    main()
