"""(e) Decoders with several positions in flight: passes, time and right answers against plain decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import chains
from .chains import Size
from .commands import Commands, read
from .markdown import block, claim, kept, minutes, spread, table

TERMS, R = 12, 32
# Records of 52 tokens and EOS.
TASK = f"task:sums?length={TERMS}&answer=running&modulo=10"
WINDOW = ["request.decoder=diffusion", "request.max_in_flight=32"]
DECODERS = {
    "plain": [],
    "wave": ["request.decoder=wave", "request.max_in_flight=8"],
    "diffusion": [*WINDOW, "request.diffusion={inner: 4, headway: 1}"],
    "faster": [*WINDOW, "request.diffusion={inner: 4, headway: 2}"],
}
NAMES = {
    "plain": "plain", "wave": "`wave`, W = 8", "diffusion": "`diffusion`, r' = 4", "faster": "the same, `headway` 2",
}  # fmt: skip
BATCHES = {1: 16, 4: 32, 16: 100}  # requests at once, and held-out problems
DATA = [f"data.train={TASK}", "data.streaming=true", "data.sequence_length=53", "batch_size=32"]
MUON = ["optimiser.kind=muon", "optimiser.learning_rate=3e-3", "optimiser.schedule=linear", "optimiser.warmup=0.05"]
BASE = [*DATA, *MUON, "optimiser.muon_learning_rate=0.02"]
DEEP = [*DATA, *MUON, "optimiser.muon_learning_rate=0.01", "recurrence.sampler=poisson-lognormal"]
DEEP += ["recurrence.mean=6", "recurrence.max=16"]
STEPS = {"base": 400, "model": 120}


def tasks(at: Commands, size: Size) -> list[Callable[[], Any]]:
    return [lambda seed=seed: _train(at, size, seed) for seed in size.seeds]


def _train(at: Commands, size: Size, seed: int) -> None:
    """A plain model learns the sums; converted, it learns to keep them at any depth."""
    empty = chains.untrained(at, "sums/empty", seed, "task:sums", "num_hidden_layers=4")
    base, converted, model = (f"sums/{name}-{seed}" for name in ("base", "converted", "model"))
    chains.train(at, base, empty, BASE, size.steps(STEPS["base"]), seed)
    at.run(converted, "convert", base, converted, "sizes=1,2,1", "injection=linear", f"num_recurrences={R}")
    chains.train(at, model, converted, DEEP, size.steps(STEPS["model"]), seed)


def alone(at: Commands, size: Size) -> None:
    """Speeds, with nothing beside them: the decoders in turn, once with each seed."""
    for seed in size.seeds:
        for batch in BATCHES:
            for name, request in DECODERS.items():
                _measure(at, size, f"sums/{name}-{batch}-{seed}.json", seed, batch, request)


def _measure(at: Commands, size: Size, made: str, seed: int, batch: int, request: list[str]) -> None:
    data = f"data={TASK}&records={min(BATCHES[batch], size.records)}"
    engine = ["engine=lanes", f"batch_size={batch}", f"num_recurrences={R}"]
    at.run(made, "eval", f"sums/model-{seed}", data, *engine, *request, "--out", made)


def lines(at: Commands, size: Size) -> list[str]:
    """The section. Raises FileNotFoundError where a run has not finished."""
    found = {
        (name, batch): [read(at.out / f"sums/{name}-{batch}-{seed}.json")["results"][0] for seed in size.seeds]
        for name in DECODERS
        for batch in BATCHES
    }

    def ratios(name: str, batch: int) -> list[float]:
        both = zip(found[name, batch], found["plain", batch], strict=True)
        return [one["tokens_per_second"] / plain["tokens_per_second"] for one, plain in both]

    def right(name: str) -> list[float]:
        return [100 * row["accuracy"] for row in found[name, max(BATCHES)]]

    rows = [
        [
            NAMES[name],
            spread([row["passes_per_token"] for row in found[name, 1]]),
            *(spread(ratios(name, batch), ".2f") + "x" for batch in BATCHES),
            spread(right(name)),
        ]
        for name in DECODERS
    ]
    even = [1.0] * len(size.seeds)
    parallel = [name for name in DECODERS if name != "plain"]
    return [
        "## (e) Decoders with several positions in flight",
        "",
        f"A plain model of 4 layers, 128 wide, learns running sums of {TERMS} signed digits modulo 10 (`{TASK}`); "
        "converted with a core of 2 layers, it learns to keep them at R of mean 6. The lane engine then answers "
        f"held-out ones at R = {R}, {2 * TERMS} tokens each, with as many requests at once as the head says. Time is "
        "tokens a second against plain decoding, prompts included; passes of the core are those at one request, one "
        f"after the other ({minutes(at.seconds('sums/'))} of one core):",
        "",
        *table(["", "passes a token", *(f"speed, {batch} at once" for batch in BATCHES), "right in %"], rows),
        *(claim(f"{NAMES[name]} is faster than plain decoding, one at once", ratios(name, 1), even, "times", ".2f")
          for name in parallel),
        *(kept(f"{NAMES[name]} has the right answers of plain decoding", right(name), right("plain"))
          for name in parallel),
        "",
        "[Waves and diffusion](concepts/decoders.md#measured) has another model, with pictures.",
        "",
        *block("many minutes; tests/test_results.py runs them with fewer steps", [
            at.line(f"sums/{name}") for name in (
                *(f"{made}-{size.seeds[0]}" for made in ("empty", "base", "converted", "model")),
                *(f"{name}-1-{size.seeds[0]}.json" for name in DECODERS))
        ]),
    ]  # fmt: skip
