"""(c) A retrofitted model against plain ones at equal FLOPs, a base that fails, and early exit in the lane engine."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import chains, pictures
from .chains import DEPTHS, HOPS, TRAINED, Size
from .commands import Commands, read
from .costs import spent, steps_worth
from .markdown import block, claim, judged, kept, minutes, spread, table

PLAIN = ["--recipe=hops", "recurrence=null"]
LAYERS = 10  # of the deep plain model
DIGITS_BASE = 1500  # steps; 1 hop takes longer than a lookup
EXIT = ["request.exit_rule=cosine", "request.exit_threshold=0.05", "request.prompt_exit=true"]
EXIT_HOPS, EXIT_R = [1, 2, 4, 6, 8], 16


def bases(at: Commands, size: Size, seed: int) -> None:
    """The base and the retrofitted model, whose FLOPs the others have."""
    chains.base(at, size, seed)
    chains.converted(at, seed)
    chains.retrofitted(at, size, seed)
    chains.measure(at, size, f"chains/base-{seed}", None)
    chains.measure(at, size, f"chains/hops-{seed}")


def tasks(at: Commands, size: Size) -> list[Callable[[], Any]]:
    each = [_deep, _plain, _digits]
    return [lambda run=run, seed=seed: run(at, size, seed) for run in each for seed in size.seeds]


def _plain(at: Commands, size: Size, seed: int) -> None:
    model, made = f"chains/base-{seed}", f"chains/plain-{seed}"
    flops = spent(at.out / f"chains/hops-{seed}")
    chains.train(at, made, model, PLAIN, steps_worth(at.out / model, PLAIN, flops), seed)
    chains.measure(at, size, made, None)


def _deep(at: Commands, size: Size, seed: int) -> None:
    empty = chains.untrained(at, "chains/empty-deep", seed, "task:hops", f"num_hidden_layers={LAYERS}")
    base, made = f"chains/deep-base-{seed}", f"chains/deep-{seed}"
    chains.train(at, base, empty, ["--recipe=hops-base"], size.of("hops-base"), seed)
    flops = sum(spent(at.out / f"chains/{name}-{seed}") for name in ("base", "hops")) - spent(at.out / base)
    chains.train(at, made, base, PLAIN, steps_worth(at.out / base, PLAIN, flops), seed)
    chains.measure(at, size, made, None)


def _digits(at: Commands, size: Size, seed: int) -> None:
    """Answers are digits alone: no lookups, in the base and behind it."""
    base, made = f"chains/digits-base-{seed}", f"chains/digits-{seed}"
    task = ["--recipe=hops-base", "data.train=task:hops?hops=1&lookups=0"]
    chains.train(at, base, f"chains/empty-{seed}", task, size.steps(DIGITS_BASE), seed)
    chains.measure(at, size, base, None)
    chains.converted(at, seed, "digits-base")
    settings = ["--recipe=hops", chains.phases(lambda source: f"{source}&lookups=0")]
    chains.train(at, made, f"chains/digits-base-converted-{seed}", settings, size.of("hops"), seed)
    chains.measure(at, size, made)


def alone(at: Commands, size: Size) -> None:
    """Speeds, with nothing beside them: fixed depth and the exit rule in turn."""
    for seed in size.seeds:
        for name, request in (("fixed", []), ("exits", EXIT)):
            made = f"chains/{name}-{seed}.json"
            engine = ["engine=lanes", "kv_policy=last-exited", "batch_size=16", f"num_recurrences={EXIT_R}"]
            data = chains.asked(size, EXIT_HOPS)
            at.run(made, "eval", f"chains/hops-{seed}", data, "group=hops", *engine, *request, "--out", made)


def results(at: Commands, size: Size, name: str) -> list[dict[str, Any]]:
    return [read(at.out / f"chains/{name}-{seed}.json") for seed in size.seeds]


def lines(at: Commands, size: Size, images: Path, link: str) -> list[str]:
    """The section, with its pictures. Raises FileNotFoundError where a run has not finished."""
    ours, plain, deep, digits = (results(at, size, name) for name in ("hops", "plain", "deep", "digits"))
    flops = [spent(at.out / f"chains/hops-{seed}") for seed in size.seeds]
    name = f"retrofitted, {len(size.seeds)} seeds" if len(size.seeds) > 1 else "retrofitted"
    heat = chains.pooled(ours, name, at.out / "chains/pooled.json")
    pictures.drawn("eval", heat, images / "results-hops.png")
    arms = {"retrofitted": ours, "answers are digits alone": digits}
    levels = {"plain, 2 layers": plain, f"plain, {LAYERS} layers": deep}
    pictures.accuracy(arms, levels, images / "results-depth.png")
    exits, served = _exits(at, size, images, link)
    return [
        "## (c) Chains of assignments: what depth buys",
        "",
        "`c=b;a=7;x=4;b=a;?c=7`: each answer is some hops away, 0 are lookups. The base of 2 layers, 128 wide, "
        "learned lookups (recipe `hops-base`). Then it learns chains of up to 8 hops, retrofitted with 1 prelude and "
        f"1 core layer (recipe `hops`, {sum(flops) / len(flops):.2e} FLOPs), or as it is, for the same FLOPs. The "
        f"plain model of {LAYERS} layers has the FLOPs of both parts, from random weights on. Right answers in %, mean "
        f"± standard deviation over {len(size.seeds)} seeds; the same {size.records} held-out problems a group in "
        "every seed; more than 8 hops were never trained.",
        "",
        f"![Right answers by hops and R]({link}/results-hops.png)",
        "",
        f"![Right answers against R and against FLOPs]({link}/results-depth.png)",
        "",
        *_table(at, size, ours, plain, deep, digits),
        *_claims(size, ours, plain, deep, digits),
        "",
        "The commands of one seed:",
        "",
        *block("many minutes; the guide to training has the first ones, run with fewer steps", _commands(at, size)),
        *exits,
        f"Trained and measured in {minutes(at.seconds('chains/') - at.seconds('chains/grown'))} of one core.",
        "",
        *served,
    ]  # fmt: skip


def _table(at: Commands, size: Size, *found: list[dict[str, Any]]) -> list[str]:
    ours, plain, deep, digits = found

    def row(name: str, each: list[dict[str, Any]], depth: int | None = None) -> list[str]:
        return [name, *(spread(cell) for cell in zip(*(chains.rights(one, depth) for one in each), strict=True))]

    def steps(name: str) -> str:
        each = [read(at.out / f"chains/{name}-{seed}/run.json")["spent"]["steps"] for seed in size.seeds]
        return f"{round(sum(each) / len(each)):,}"

    rows = [row("the base", results(at, size, "base"))]
    rows += [row(f"retrofitted, R = {depth}", ours, depth) for depth in DEPTHS]
    rows += [row(f"plain, 2 layers, {steps('plain')} steps more", plain)]
    rows += [row(f"plain, {LAYERS} layers, {steps('deep-base')} + {steps('deep')} steps", deep)]
    rows += [row("digits alone: its base", results(at, size, "digits-base"))]
    rows += [row(f"digits alone, R = {depth}", digits, depth) for depth in (1, TRAINED)]
    return table(["hops", *map(str, HOPS), "all"], rows)


def _claims(size: Size, ours: Any, plain: Any, deep: Any, digits: Any) -> list[str]:
    def whole(each: Any, depth: int | None = None) -> list[float]:
        return [chains.rights(one, depth)[-1] for one in each]

    rising = [1, 2, 3, 4, 6, 8]
    by_depth = [whole(ours, depth) for depth in rising]
    rises = [all(a < b for a, b in pairwise(of)) for of in zip(*by_depth, strict=True)]
    return [
        claim("Retrofitted, R = 8, beats plain, 2 layers", whole(ours, TRAINED), whole(plain)),
        claim(f"Retrofitted, R = 8, beats plain, {LAYERS} layers", whole(ours, TRAINED), whole(deep)),
        judged(
            f"Accuracy rises with R = {', '.join(map(str, rising))}", rises, ", ".join(map(spread, by_depth))
        ),
        kept("More R than needed does no harm: R = 16 is as good as R = 8", whole(ours, 16), whole(ours, TRAINED)),
        claim("Answers that are digits alone gain from depth as well (R = 8 over R = 1)", whole(digits, TRAINED),
              whole(digits, 1)),
    ]  # fmt: skip


def _commands(at: Commands, size: Size) -> list[str]:
    seed = size.seeds[0]
    made = ["empty-{}", "base-{}", "base-converted-{}", "hops-{}", "hops-{}.json", "plain-{}", "plain-{}.json"]
    made += ["empty-deep-{}", "deep-base-{}", "deep-{}", "digits-base-{}", "digits-base-converted-{}", "digits-{}"]
    return [at.line(f"chains/{name.format(seed)}") for name in made]


def _exits(at: Commands, size: Size, images: Path, link: str) -> tuple[list[str], list[str]]:
    """(the part on early exit, its commands)."""
    fixed, exits = results(at, size, "fixed"), results(at, size, "exits")
    rows = []
    for hops in map(str, EXIT_HOPS):
        cells = [one["results"][0]["groups"][hops] for one in exits]
        full = [100 * one["results"][0]["groups"][hops]["accuracy"] for one in fixed]
        depth = spread([cell["mean_recurrences"] for cell in cells], ".2f")
        rows.append([hops, depth, spread([100 * cell["accuracy"] for cell in cells]), spread(full)])
    speeds = [[one["results"][0]["tokens_per_second"] for one in each] for each in (exits, fixed)]
    faster = [a / b for a, b in zip(*speeds, strict=True)]
    depths = [[one["results"][0]["groups"][str(h)]["mean_recurrences"] for h in EXIT_HOPS] for one in exits]
    right = [[100 * one["results"][0]["accuracy"] for one in each] for each in (exits, fixed)]
    pictures.drawn("depth", at.out / f"chains/exits-{size.seeds[0]}.json", images / "results-exits.png")
    section = [
        "### Early exit in the lane engine",
        "",
        f"Each token leaves when the cosine of its last two states exceeds 0.95, at R = {EXIT_R} at most; prompts "
        "leave, too. 16 requests at once, `kv_policy=last-exited`:",
        "",
        *table(["hops", "recurrences", "right in %", f"right at R = {EXIT_R}"], rows),
        f"![Recurrences by hops]({link}/results-exits.png)",
        "",
        judged("Shallow questions leave earlier than deep ones", [of == sorted(of) and of[0] < of[-1] for of in depths],
               f"{spread([of[0] for of in depths])} for 1 hop, {spread([of[-1] for of in depths])} for 8"),
        kept("Early exit keeps the right answers", *right),
        claim("Early exit serves more tokens a second", faster, [1.0] * len(faster), "times", ".2f"),
        f"- Tokens a second, prompts included: {spread(speeds[0], ',.0f')} with exits, {spread(speeds[1], ',.0f')} at "
        f"R = {EXIT_R}: {spread(faster, '.2f')}x.",
        "",
    ]  # fmt: skip
    commands = [at.line(f"chains/{name}-{size.seeds[0]}.json") for name in ("fixed", "exits")]
    return section, block("it takes the model that the commands above train", commands)
