"""(d) Mixture-of-Recursions and fixed recursion: from the same weights, each at its best rate, at equal FLOPs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from . import chains
from .chains import Size
from .commands import Commands, read
from .costs import price, spent, steps_worth
from .markdown import block, claim, judged, minutes, spread, table

LOOPS = 3
PHASES = [
    {"share": 0.4, "sources": {"task:hops?hops=0": 1}},
    {"share": 0.3, "sources": {"task:hops?hops=1..2": 1}},
    {"share": 0.3, "sources": {"task:hops?hops=1..2": 0.25, "task:hops?hops=1..3": 1}},
]
ASKED = [1, 2, 3]  # hops
SCHEDULE = ["optimiser.schedule=wsd", "optimiser.warmup=0.05", "optimiser.cooldown=0.2", "recurrence.sampler=fixed"]


@dataclass(frozen=True)
class Kind:
    """The task of the two models. rate: the setting that is tuned, among `rates`.   steps: of fixed recursion."""

    name: str
    empty: tuple[str, ...]  # arguments of init
    router: tuple[str, ...]
    settings: tuple[str, ...]
    rate: str
    rates: tuple[str, ...]
    steps: int


KINDS = (
    Kind(
        "text",
        ("text/tokenizer", "num_hidden_layers=8"),
        (),
        ("data.train=text/train.jsonl", "data.cache=cache", "data.sequence_length=128", "batch_size=16", *SCHEDULE),
        "optimiser.learning_rate",
        ("1e-3", "3e-3"),
        600,
    ),
    Kind(
        "chains",
        ("task:hops", "num_hidden_layers=5"),
        ("router.kv=first-recursion",),
        (f"data.phases={json.dumps(PHASES)}", "data.streaming=true", "data.sequence_length=64", "batch_size=32",
         "optimiser.kind=muon", "optimiser.learning_rate=3e-3", *SCHEDULE),
        "optimiser.muon_learning_rate",
        ("0.01", "0.02"),
        800,
    ),
)  # fmt: skip
ARMS = {"fixed": ("method=recursive",), "mor": ("method=mor", "router.auxiliary=true")}
SERVED = ("topk", "threshold")  # how a trained router takes tokens


def prepare(at: Commands, size: Size) -> None:
    """The untrained models of both arms, with the same weights; other ones for each seed."""
    for kind, seed in product(KINDS, size.seeds):
        empty = chains.untrained(at, f"routing/{kind.name}-empty", seed, *kind.empty)
        for arm, settings in ARMS.items():
            router = kind.router if arm == "mor" else ()
            made = _untrained(kind, arm, seed)
            at.run(made, "convert", empty, made, *settings, f"loops={LOOPS}", "sharing=middle-cycle", *router)


def tuning(at: Commands, size: Size) -> list[Callable[[], Any]]:
    """Every rate of every arm, with the first seed."""
    return [
        lambda kind=kind, arm=arm, rate=rate: _run(at, size, kind, arm, rate, size.seeds[0])
        for kind in KINDS
        for arm in ARMS
        for rate in kind.rates
    ]


def others(at: Commands, size: Size) -> list[Callable[[], Any]]:
    """The best rate of every arm, with the other seeds."""
    return [
        lambda kind=kind, arm=arm, seed=seed: _run(at, size, kind, arm, best(at, size, kind, arm), seed)
        for kind in KINDS
        for arm in ARMS
        for seed in size.seeds[1:]
    ]


def _run(at: Commands, size: Size, kind: Kind, arm: str, rate: str, seed: int) -> None:
    model, made = _untrained(kind, arm, seed), _name(kind, arm, rate, seed)
    settings, steps = [*kind.settings, f"{kind.rate}={rate}"], size.steps(kind.steps)
    if arm == "mor":
        flops = price(at.out / _untrained(kind, "fixed", seed), settings, steps)
        settings.append("objectives.router.auxiliary=0.001")
        steps = steps_worth(at.out / model, settings, flops)
    chains.train(at, made, model, settings, steps, seed)
    if kind.name == "text":
        data = ["data=text/held_out.jsonl", "sequence_length=128", *(["limit=8"] if size.share < 0.1 else [])]
    else:
        data = [chains.asked(size, ASKED), "group=hops"]
    ways = (
        {way: [f"router_inference={way}"] for way in SERVED} if arm == "mor" else {"depths": ["num_recurrences=1,2,3"]}
    )
    for way, more in ways.items():
        out = f"{made}-{way}.json"
        at.run(out, "eval", made, *data, *more, "--out", out)


def _untrained(kind: Kind, arm: str, seed: int) -> str:
    return f"routing/{kind.name}-{arm}-{seed}"


def _name(kind: Kind, arm: str, rate: str, seed: int) -> str:
    return f"routing/{kind.name}-{arm}-{rate}-{seed}"


def best(at: Commands, size: Size, kind: Kind, arm: str) -> str:
    """The rate with which the first seed did best."""
    return max(kind.rates, key=lambda rate: _value(at, kind, arm, rate, size.seeds[0]))


def _value(at: Commands, kind: Kind, arm: str, rate: str, seed: int, way: str = "") -> float:
    """Right answers in %, or the negative loss: the greater the better. A router takes the best of the sequence."""
    way = way or ("topk" if arm == "mor" else "depths")
    row = read(at.out / f"{_name(kind, arm, rate, seed)}-{way}.json")["results"][-1]
    return 100 * row["accuracy"] if kind.name == "chains" else -row["loss"]


def lines(at: Commands, size: Size) -> list[str]:
    """The section. Raises FileNotFoundError where a run has not finished."""
    found = [
        "## (d) Mixture-of-Recursions against fixed recursion",
        "",
        f"Both from the same random weights, 128 wide, with {LOOPS} recursions between the first and the last layer: "
        "of two layers on text (Python's standard library or the text that was given, character by character), of one "
        "layer on chains of up to 3 hops, where chosen tokens see the first recursion's keys and values of all "
        "tokens. Capacities are 1, 2/3 and 1/3; the auxiliary loss has weight 0.001, and no warm-up. Equal FLOPs, "
        "learning rates tuned for each arm on the first seed. *top-k* takes the best of the whole sequence, as the "
        f"paper measures; *threshold* decides for each token alone, as it is served ({minutes(at.seconds('routing/'))} "
        "of one core):",
        "",
    ]  # fmt: skip
    for kind in KINDS:
        found += _part(at, size, kind)
    kind = KINDS[0]
    commands = [f"routing/{kind.name}-empty-{size.seeds[0]}"]
    for arm in ARMS:
        run = _name(kind, arm, best(at, size, kind, arm), size.seeds[0])
        commands += [_untrained(kind, arm, size.seeds[0]), run, f"{run}-{'topk' if arm == 'mor' else 'depths'}.json"]
    return [*found, *block("many minutes, and the text of the run", [at.line(made) for made in commands])]


def _part(at: Commands, size: Size, kind: Kind) -> list[str]:
    chosen = {arm: best(at, size, kind, arm) for arm in ARMS}
    text = kind.name == "text"
    sign, form, unit = (-1, ".4f", "nats a character") if text else (1, ".1f", "%")
    rows, values = [], {}
    for arm, way, name in (
        ("fixed", "depths", "fixed recursion"),
        ("mor", "topk", "Mixture-of-Recursions, top-k"),
        ("mor", "threshold", "Mixture-of-Recursions, threshold"),
    ):
        rate = chosen[arm]
        values[way] = [_value(at, kind, arm, rate, seed, way) for seed in size.seeds]
        steps = read(at.out / _name(kind, arm, rate, size.seeds[0]) / "run.json")["spent"]["steps"]
        tuned = ", ".join(
            f"{rate}: {sign * _value(at, kind, arm, rate, size.seeds[0], way):{form}}" for rate in kind.rates
        )
        rows.append([name, f"{steps:,}", spread([sign * value for value in values[way]], form), tuned])
    by_depth = _by_depth(at, size, kind, chosen["fixed"])
    flops = spent(at.out / _name(kind, "fixed", chosen["fixed"], size.seeds[0]))
    title = f"{kind.name}, {flops:.2e} FLOPs"
    metric = "held-out loss" if text else "right in %, 1 to 3 hops"
    return [
        *table([title, "steps", metric, f"first seed by {kind.rate.partition('.')[2]}"], rows),
        *(claim(f"On {kind.name}, Mixture-of-Recursions ({way}) beats fixed recursion", values[way], values["depths"],
                unit, form) for way in SERVED),
        judged(f"On {kind.name}, fixed recursion gains from its depth at all (R = {LOOPS} over R = 1)",
               [sign * of[-1] > sign * of[0] for of in by_depth],
               "R = 1, 2, 3: " + ", ".join(spread(each, form) for each in zip(*by_depth, strict=True))),
        "",
    ]  # fmt: skip


def _by_depth(at: Commands, size: Size, kind: Kind, rate: str) -> list[list[float]]:
    """The loss, or right answers in %, of fixed recursion at each R, for every seed."""
    found = []
    for seed in size.seeds:
        rows = read(at.out / f"{_name(kind, 'fixed', rate, seed)}-depths.json")["results"]
        found.append([row["loss"] if kind.name == "text" else 100 * row["accuracy"] for row in rows])
    return found
