"""(a) SmolLM2-135M tied in two loops: with a LoRA by SVD or without, distilled or not; and from random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import pictures
from .chains import Size
from .commands import Commands, read
from .costs import costs, spent
from .markdown import block, judged, minutes, table

LENGTH, BATCH, STEPS, RATE = 256, 4, 200, "3e-4"
KINDS = {
    "tied": ["init=stepwise"],
    "lora-low": ["init=stepwise", "lora.rank=64", "lora.init=svd"],
    "lora-high": ["init=average", "lora.rank=256", "lora.init=svd"],
    "random": ["init=random"],
}
RANKS = {"lora-low": "rank 64", "lora-high": "rank 256"}
FULL = {"lora.rank=256": "lora.rank={q: 256, k: 192, v: 192, o: 256, gate: 256, up: 256, down: 256}"}  # k, v: 192 wide
ARMS = [(kind, way) for kind in KINDS for way in ("labels", "distilled") if (kind, way) != ("random", "distilled")]


def name(kind: str, way: str) -> str:
    first = {"tied": "tied", "random": "tied, random start"}.get(kind, f"tied + SVD LoRA, {RANKS.get(kind)}")
    return f"{first}, distilled" if way == "distilled" else first


def prepare(at: Commands, size: Size, source: Path, small: bool) -> None:
    """Convert, and measure the source and all starts. small: ranks that a small source has.

    The teacher is the source in one loop, as a GGUF file is none.
    """
    teacher = "relaxed/teacher"
    at.run(teacher, "convert", source.name, teacher, "method=recursive", "loops=1", "dtype=float32")
    for kind, settings in KINDS.items():
        made, own = f"relaxed/{kind}", [FULL.get(one, one) for one in settings]
        if small:
            own = [f"lora.rank={4 if 'low' in kind else 8}" if one.startswith("lora.rank") else one for one in own]
        at.run(made, "convert", source.name, made, "method=recursive", "loops=2", *own, "dtype=float32")
    for made, model in {"source": source.name, **{kind: f"relaxed/{kind}" for kind in KINDS}}.items():
        out = f"relaxed/start-{made}.json"
        at.run(out, "eval", model, *_held_out(size), "--out", out)


def _held_out(size: Size) -> list[str]:
    return ["data=text/held_out.jsonl", f"sequence_length={LENGTH}", f"limit={20 if size.share == 1 else 2}"]


def tasks(at: Commands, size: Size) -> list[Callable[[], Any]]:
    return [lambda kind=kind, way=way: _run(at, size, kind, way) for kind, way in ARMS]


def _run(at: Commands, size: Size, kind: str, way: str) -> None:
    made, steps = f"relaxed/{kind}-{way}", size.steps(STEPS)
    settings = [
        f"steps={steps}",
        f"batch_size={BATCH}",
        f"data.sequence_length={LENGTH}",
        "data.train=text/train.jsonl",
    ]
    settings += ["data.eval=text/few.jsonl", f"eval_every={max(1, steps // 10)}", "data.cache=cache"]
    settings += [f"optimiser.learning_rate={RATE}", "optimiser.warmup=0.05", f"log_every={max(1, steps // 20)}"]
    settings += [f"save_every={max(1, steps // 10)}", "keep_checkpoints=1"]
    if way == "distilled":
        settings += ["objectives.distillation.teacher=relaxed/teacher", "objectives.cross_entropy=0.5"]
        settings += ["objectives.distillation.weight=0.5"]
    at.run(made, "train", f"relaxed/{kind}", made, *settings)
    at.run(f"{made}.json", "eval", made, *_held_out(size), "--out", f"{made}.json")


def few(folder: Path, characters: int = 20_000) -> None:
    """few.jsonl: the first held-out documents, which the runs measure ten times."""
    if not (folder / "few.jsonl").is_file():
        found, size = [], 0
        for line in (folder / "held_out.jsonl").read_text().splitlines():
            if size < characters:
                found.append(line)
                size += len(json.loads(line)["text"])
        (folder / "few.jsonl").write_text("\n".join(found) + "\n")


def lines(at: Commands, size: Size, source: Path, images: Path, link: str) -> list[str]:
    """The section, with its picture. Raises FileNotFoundError where a run has not finished."""
    start = {made: read(at.out / f"relaxed/start-{made}.json")["results"][-1]["loss"] for made in ("source", *KINDS)}
    ends = {(kind, way): read(at.out / f"relaxed/{kind}-{way}.json")["results"][-1]["loss"] for kind, way in ARMS}
    forward = 2 * sum(part.forward for part in costs(at.out / "relaxed/teacher"))
    teacher = forward * size.steps(STEPS) * BATCH * LENGTH
    flops = {
        (kind, way): spent(at.out / f"relaxed/{kind}-{way}") + (teacher if way == "distilled" else 0)
        for kind, way in ARMS
    }
    gap = start["tied"] - start["source"]
    rows = [["the source", "", f"{start['source']:.4f}", "", "", ""]]
    for arm in ARMS:
        recovered = start["tied"] - ends[arm]
        rows.append([
            name(*arm), f"{start[arm[0]]:.4f}", f"{ends[arm]:.4f}", f"{100 * recovered / gap:.0f} %",
            f"{flops[arm]:.2e}", f"{recovered / flops[arm] * 1e15:.2f}",
        ])  # fmt: skip
    pictures.curves(
        {name(*arm): _curve(at, arm, flops[arm]) for arm in ARMS},
        ("the source", _level(at)),
        images / "results-relaxed.png",
    )
    tokens, shown = size.steps(STEPS) * BATCH * LENGTH, "lora-low-distilled"
    return [
        "## (a) Recovering what tying took away",
        "",
        f"{source.name}, tied in two loops over half of its layers, learns {tokens:,} tokens of text (AdamW, {RATE}, "
        f"blocks of {LENGTH}); distillation is the forward KL to the source beside the labels, half and half, and its "
        "FLOPs include the teacher's. The gap is that between the tied model before training and the source; loss in "
        f"nats a token, one seed ({minutes(at.seconds('relaxed/'))} of two cores):",
        "",
        *table(["", "loss before", "after", "gap recovered", "FLOPs", "nats a PFLOP"], rows),
        f"![Held-out loss against training FLOPs]({link}/results-relaxed.png)",
        "",
        *_claims(ends),
        "",
        *block("hours, and a real model", [
            at.line(f"relaxed/{made}") for made in ("teacher", "lora-low", shown, f"{shown}.json")
        ]),
    ]  # fmt: skip


def _claims(ends: dict[tuple[str, str], float]) -> list[str]:
    def line(text: str, better: tuple[str, str], worse: tuple[str, str]) -> str:
        return judged(text, [ends[better] < ends[worse]], f"{ends[better]:.4f} against {ends[worse]:.4f}")

    relaxations = [(kind, way) for kind in RANKS for way in ("labels", "distilled")]
    found = [
        line(f"{name(kind, way)}: recovers more than tying alone", (kind, way), ("tied", way))
        for kind, way in relaxations
    ]
    kinds = ("tied", *RANKS)
    found += [
        line(f"{name(kind, 'labels')}: distillation recovers more than labels", (kind, "distilled"), (kind, "labels"))
        for kind in kinds
    ]
    return [
        *found,
        line("Tying recovers more from the source than from random weights", ("tied", "labels"), ("random", "labels")),
    ]


def _curve(at: Commands, arm: tuple[str, str], flops: float) -> list[tuple[float, float]]:
    """(training FLOPs, held-out loss) along a run."""
    log = read(at.out / f"relaxed/{arm[0]}-{arm[1]}/trainer_state.json")
    steps = log["max_steps"]
    return [
        (flops * row["step"] / steps, row[key])
        for row in log["log_history"]
        for key in row
        if key == "eval_loss" or key.startswith("eval_loss_r2")
    ]


def _level(at: Commands) -> float:
    return read(at.out / "relaxed/few-source.json")["results"][-1]["loss"]
