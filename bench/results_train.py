"""The papers' orderings on small models, with seeds and error bars: writes docs/results.md.

    python bench/results_train.py [--out results-train] [--scale 1.0] [--seeds 3] [--text PATH] [--report FILE]

Everything is a `loopwise` command; a finished one is not run again, a killed one goes on (`--resume`). `--scale`
multiplies all steps; 1.0 is meant for less than an hour of one quiet core. Every figure is read from the
runs' files; the sentences under each table follow from the figures.

(a) stepwise tying + SVD LoRA + distillation, tying alone, random start     held-out loss beside the source's
(b) a curriculum of recurrences, all recurrences from the start             held-out loss at equal FLOPs, FLOPs at equal
                                                                            held-out loss
(c) a retrofitted model, the plain one trained on                           accuracy at equal FLOPs, and by R
(d) Mixture-of-Recursions, fixed recursion                                  held-out loss at equal FLOPs

(a), (b) and (d) learn text, character by character; (c) learns arithmetic, of which only the answers count.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import random
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from loopwise.cli import main as command
from loopwise.demo import read_documents, split
from loopwise.train.curriculum import Schedule
from loopwise.train.measure import parameter_costs, token_flops
from loopwise.train.pretrained import load_config, load_model
from loopwise.train.recipe import Train
from loopwise.train.run import RECIPE, curriculum

TOKENS = 1024  # in a batch
LENGTHS = {"text": 128, "sums": 64}  # of its blocks
HEADS = {"text": 3, "sums": 2}  # of width 32
RATES = {"text": 1e-3, "sums": 2e-3}
LOOPS, MEAN = 2, 4
MODULUS, DEPTHS = 5, [1, 2, 4, 6, 8]
BASE_TERMS, TERMS, MEASURED = 4, 7, [3, 4, 5, 6, 7]  # of the base, of the comparison
SIGNS = "0123456789+*="
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def problems(seed: int, count: int, terms: int) -> list[tuple[str, str]]:
    """Chains of `terms` digits, read from left to right modulo MODULUS: ("3+2*4=", "0")."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(count):
        value = rng.randrange(MODULUS)
        asked = str(value)
        for _ in range(terms - 1):
            sign = rng.choice("+*")
            digit = rng.randrange(MODULUS) if sign == "+" else rng.randrange(2, MODULUS)
            value = (value + digit if sign == "+" else value * digit) % MODULUS
            asked += f"{sign}{digit}"
        drawn.append((f"{asked}=", str(value)))
    return drawn


def prepare(out: Path, scale: float, text: Path | None) -> None:
    """For text and for sums: records, and an untrained plain model with a tokenizer of characters."""
    if (out / "sums" / "empty" / "tokenizer.json").is_file():
        return
    for name, characters in (("text", CHARACTERS), ("sums", SIGNS)):
        folder = out / name
        (folder / "empty").mkdir(parents=True, exist_ok=True)
        vocabulary = {token: i for i, token in enumerate(["<eos>", *characters])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        config = LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32 * HEADS[name],
            intermediate_size=32 * HEADS[name] * 8 // 3,
            num_hidden_layers=8,
            num_attention_heads=HEADS[name],
            num_key_value_heads=HEADS[name],
            max_position_embeddings=128,
            eos_token_id=0,
            bos_token_id=None,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "empty")
        PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<eos>", chat_template=CHAT if name == "sums" else None
        ).save_pretrained(folder / "empty")
    written = (
        document.translate({ord(c): None for c in set(document) - set(CHARACTERS)}) for document in read_documents(text)
    )
    _, held_out = split(list(written), out / "text")
    # They are measured often.
    short = [json.loads(record)["text"][1000:5000] for record in held_out.read_text().splitlines()]
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in short if text))
    for terms in range(2, TERMS + 1):
        records = [
            {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
            for ask, answer in problems(terms, max(1000, round(20_000 * scale)), terms)
        ]
        (out / "sums" / f"{terms}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def loopwise(*arguments: object, makes: Path) -> None:
    """Run a command in this process: it would take as long to start one as some of the runs do."""
    argv = [str(argument) for argument in arguments]
    print("loopwise", *argv, flush=True)
    with contextlib.redirect_stdout(io.StringIO()):
        code = command(argv)
    if code or not (makes / "config.json").is_file():  # a run that is told to stop saves, and ends well
        sys.exit(code or 1)


class Bench:
    def __init__(self, out: Path, scale: float, seeds: int):
        self.out, self.scale, self.seeds = out, scale, range(seeds)

    def steps(self, count: float) -> int:
        return max(8, round(count * self.scale))

    def convert(self, name: str, source: Path, *settings: str) -> Path:
        target = self.out / name
        if not (target / "config.json").is_file():
            loopwise("convert", source, target, *settings, makes=target)
        return target

    def train(self, task: str, name: str, model: Path, steps: int, seed: int, *settings: str) -> Path:
        target = self.out / f"{name}-{seed}"
        if not (target / "config.json").is_file():
            data = [f"data.cache={self.out}/cache", f"data.sequence_length={LENGTHS[task]}"]
            if task == "text":
                data += [f"data.train={self.out}/text/train.jsonl", f"data.eval={self.out}/text/held_out.jsonl"]
            else:
                data += ["data.chat_field=messages", "data.separate_documents=true"]
            sizes = [f"batch_size={TOKENS // LENGTHS[task]}", f"steps={steps}", f"seed={seed}"]
            keep = [f"save_every={max(1, steps // 3)}", f"log_every={max(1, steps // 20)}", "keep_checkpoints=1"]
            rate = [f"optimiser.learning_rate={RATES[task]}", "optimiser.warmup=0.05"]
            resume = ["--resume"] if (target / RECIPE).is_file() else []
            loopwise("train", model, target, *data, *sizes, *keep, *rate, *settings, *resume, makes=target)
        return target

    def longer(self, first: int, last: int) -> str:
        """Phases of chains: from `first` digits at most to `last` over seven tenths of the run."""
        tops = range(first, last + 1)
        shares = [0.7 / len(tops)] * len(tops)
        shares[-1] += 0.3
        phases = [
            {"share": share, "sources": {f"{self.out}/sums/{n}.jsonl": 1 for n in range(2, top + 1)}}
            for share, top in zip(shares, tops, strict=True)
        ]
        return f"data.phases={json.dumps(phases)}"

    def steps_worth(self, run: Path, flops_of_a_step: float) -> int:
        """Steps at that price that cost as much as `run` did."""
        return max(8, round(spent(run)[-1] / flops_of_a_step))


@cache
def costs(model: Path) -> tuple[int, int]:
    return parameter_costs(load_model(str(model)))


def price(model: Path, passes: float) -> float:
    """FLOPs of a step of `model` whose tokens go through the core so many times, all with gradient."""
    once, recurring = costs(model)
    return TOKENS * 6 * (once + passes * recurring)


@cache
def spent(run: Path) -> np.ndarray:
    """FLOPs of a run up to each of its steps, the first 0: from its recipe and its model."""
    recipe = Train.model_validate(yaml.safe_load((run / RECIPE).read_text()))
    steps = recipe.steps or 0
    config = load_config(str(run), None)
    course, router = curriculum(config, recipe, steps), getattr(config, "router", None)
    warmup = round(((recipe.recurrence and recipe.recurrence.capacity_warmup) or 0) * steps)
    one = [token_flops(costs(run), course.at(s) if course else None, router, s, warmup) for s in range(steps)]
    return TOKENS * np.cumsum([0, *one])


def held_out(run: Path) -> dict[int, float]:
    """Held-out loss by step, at the deepest R that was measured."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    found = {}
    for record in log:
        names = [name for name in record if name.startswith("eval_loss")]
        if names:
            deepest = max(names, key=lambda name: int(name.rpartition("_r")[2]) if "_r" in name else 0)
            found[record["step"]] = record[deepest]
    return found


def final(run: Path) -> float:
    losses = held_out(run)
    return losses[max(losses)]


def flops_until(run: Path, loss: float) -> float:
    """FLOPs after which a run measured at most this held-out loss; infinite where it never did."""
    return next((spent(run)[step] for step, found in sorted(held_out(run).items()) if found <= loss), float("inf"))


@torch.no_grad()
def accuracy(run: Path, recurrences: int | None, terms: int) -> float:
    """Share of 500 chains of so many digits that are answered right."""
    model: Any = load_model(str(run)).eval()
    ids = {token: i for i, token in enumerate(SIGNS, 1)}
    asked = problems(1000 + terms, 500, terms)
    inputs = torch.tensor([[ids[c] for c in ask] for ask, _ in asked])
    keys = {"num_recurrences": recurrences} if recurrences else {}
    guess = model(input_ids=inputs, use_cache=False, **keys).logits[:, -1].argmax(-1)
    return (guess == torch.tensor([ids[answer] for _, answer in asked])).float().mean().item()


def spread(values: list[float], form: str = ".4f") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {deviation:{form}}"


def table(title: str, settings: str, metric: str, rows: dict[str, list[float]]) -> list[str]:
    head = [f"## {title}", "", settings, "", f"| | {metric}, mean ± sd | each seed |", "|---|---|---|"]
    each = (f"| {name} | {spread(values)} | {', '.join(f'{v:.4f}' for v in values)} |" for name, values in rows.items())
    return [*head, *each, ""]


def verdict(claim: str, better: list[float], worse: list[float]) -> str:
    """A sentence on whether every seed has `better` below `worse`."""
    gaps = [w - b for b, w in zip(better, worse, strict=True)]
    wins = sum(gap > 0 for gap in gaps)
    said = "Holds" if wins == len(gaps) else "Does not hold" if not wins else "Not decided"
    return f"- {claim}: **{said.lower()}** in {wins} of {len(gaps)} seeds, by {spread(gaps)}."


def relaxed(bench: Bench, base: Path) -> list[str]:
    steps = bench.steps(150)
    lora = ["lora.rank=16", "lora.init=svd"]
    distil = [f"objectives.distillation.teacher={base}", "objectives.cross_entropy=0.5"]
    kinds = {
        "stepwise + SVD LoRA + distillation": (["init=stepwise", *lora], distil),
        "stepwise, tied alone": (["init=stepwise"], []),
        "random start, tied alone": (["init=random"], []),
    }
    rows = {"the source": [final(base)]}
    for number, (name, (settings, keys)) in enumerate(kinds.items()):
        model = bench.convert(f"a{number}", base, "method=recursive", f"loops={LOOPS}", *settings)
        rows[name] = [final(bench.train("text", f"a{number}", model, steps, seed, *keys)) for seed in bench.seeds]
    best, tied, fresh = list(rows.values())[1:]
    return [
        *table(
            "(a) Recovering what tying took away",
            f"The base's 8 layers become {LOOPS} loops over {8 // LOOPS}, trained for {steps} steps at R = {LOOPS}. "
            "Relaxation is LoRA of rank 16 from the SVD; distillation is the forward KL to the base with weight 1 "
            "beside cross-entropy with weight 0.5.",
            "held-out loss",
            rows,
        ),
        verdict("Stepwise + SVD LoRA + distillation recovers more than tying alone", best, tied),
        verdict("Tying alone recovers more from a stepwise than from a random start", tied, fresh),
        "",
    ]


def growing(bench: Bench, base: Path) -> list[str]:
    model = bench.convert("b-retrofitted", base, "sizes=2,4,2", "injection=linear", f"num_recurrences={MEAN}")
    full_steps, keys = bench.steps(125), [f"recurrence.mean={MEAN}", f"recurrence.eval_at={MEAN}"]

    def often(steps: int) -> str:
        return f"eval_every={max(1, steps // 8)}"

    full = [bench.train("text", "b-full", model, full_steps, seed, *keys, often(full_steps)) for seed in bench.seeds]
    mean = statistics.mean(Schedule(MEAN, full_steps, "1-sqrt").at(step) for step in range(full_steps))
    steps = bench.steps_worth(full[0], price(model, mean))
    ramp = [*keys, "recurrence.schedule=1-sqrt", often(steps)]
    grown = [bench.train("text", "b-curriculum", model, steps, seed, *ramp) for seed in bench.seeds]
    rows = {
        f"1-sqrt curriculum to R = {MEAN}, {steps} steps": [final(run) for run in grown],
        f"R = {MEAN} from the start, {full_steps} steps": [final(run) for run in full],
    }
    ratios = [flops_until(g, final(f)) / spent(f)[-1] for g, f in zip(grown, full, strict=True)]
    reached = [ratio for ratio in ratios if np.isfinite(ratio)]
    share = f"after {spread(reached, '.2f')} of the FLOPs" if reached else "in no run"
    return [
        *table(
            "(b) A curriculum of recurrences",
            "The base is retrofitted with 2 prelude, 4 core and 2 coda layers; both runs cost the same FLOPs. The "
            f"loss is that at R = {MEAN}, measured 8 times a run.",
            "held-out loss",
            rows,
        ),
        verdict("At equal FLOPs the curriculum has the lower loss", *rows.values()),
        f"- The curriculum reaches the other's final loss in {len(reached)} of {len(ratios)} seeds, {share}.",
        "",
    ]


def retrofit(bench: Bench) -> list[str]:
    empty, base_steps, steps = bench.out / "sums" / "empty", bench.steps(1600), bench.steps(400)
    base = bench.train("sums", "sums-base", empty, base_steps, 0, bench.longer(2, BASE_TERMS))
    model = bench.convert("c-retrofitted", base, "sizes=2,4,2", "injection=linear", f"num_recurrences={MEAN}")
    longer = bench.longer(BASE_TERMS, TERMS)
    keys = [f"recurrence.mean={MEAN}", "recurrence.schedule=linear", "recurrence.sampler=poisson-lognormal"]
    runs = [bench.train("sums", "c-retrofit", model, steps, seed, longer, *keys) for seed in bench.seeds]
    worth = [bench.steps_worth(run, price(base, 0)) for run in runs]  # R is drawn by seed
    plain = [bench.train("sums", "c-plain", base, n, seed, longer) for n, seed in zip(worth, bench.seeds, strict=True)]

    def row(runs: list[Path], recurrences: int | None) -> list[list[float]]:
        """Accuracy by seed, for every number of digits and over all of them."""
        each = [[accuracy(run, recurrences, n) for run in runs] for n in MEASURED]
        return [*each, [statistics.mean(of_seed) for of_seed in zip(*each, strict=True)]]

    rows = {"the base": row([base], None), f"plain, about {round(statistics.mean(worth))} steps more": row(plain, None)}
    rows |= {f"retrofitted, {steps} steps, R = {r}": row(runs, r) for r in DEPTHS}
    found = list(rows.values())
    deeper = [statistics.mean(by_terms[-1]) for by_terms in found[2:]]
    trained, other = found[2 + DEPTHS.index(MEAN)][-1], found[1][-1]
    grows = all(a < b for a, b in itertools.pairwise(deeper))
    return [
        "## (c) Retrofitted against plain on arithmetic",
        "",
        f"Chains of additions and multiplications modulo {MODULUS}, read from left to right, as 3+2*4=0; only the "
        f"answer is learned (chance: {1 / MODULUS:.2f}). The base, 64 wide, learned those of 2 to {BASE_TERMS} digits "
        f"for {base_steps} steps at a rate of 2e-3. Then it learns those of up to {TERMS}: retrofitted with 2 prelude, "
        f"4 core and 2 coda layers, under poisson-lognormal R of mean {MEAN} + 1, or as it is, at equal FLOPs.",
        "",
        "| accuracy, mean ± sd over seeds | " + " | ".join(f"{n} digits" for n in MEASURED) + " | all |",
        "|---|" + "---|" * (len(MEASURED) + 1),
        *(f"| {name} | " + " | ".join(spread(x, ".3f") for x in by_terms) + " |" for name, by_terms in rows.items()),
        "",
        verdict(f"Retrofitted, at R = {MEAN}, has fewer wrong answers than plain", _wrong(trained), _wrong(other)),
        f"- Mean accuracy at R = {', '.join(map(str, DEPTHS))}: {', '.join(f'{x:.3f}' for x in deeper)}; it "
        + ("grows with every one of them." if grows else f"is highest at R = {DEPTHS[int(np.argmax(deeper))]}."),
        "",
    ]


def _wrong(right: list[float]) -> list[float]:
    return [1 - value for value in right]


def routed(bench: Bench, base: Path) -> list[str]:
    steps = bench.steps(150)
    fixed = bench.convert("d-fixed", base, "method=recursive", f"loops={LOOPS}", "sharing=middle-cycle")
    others = [bench.train("text", "d-fixed", fixed, steps, seed) for seed in bench.seeds]
    model = bench.convert("d-mor", base, "method=mor", f"loops={LOOPS}", "router.auxiliary=true")
    capacity = load_config(str(model), None).router["capacity"]
    # Over a warm-up of a tenth of the steps the capacity is half-way between 1 and its end on average.
    more = bench.steps_worth(others[0], price(model, 0.95 * sum(capacity) + 0.05 * len(capacity)))
    keys = ["objectives.router.auxiliary=0.001", "recurrence.capacity_warmup=0.1"]
    runs = [bench.train("text", "d-mor", model, more, seed, *keys) for seed in bench.seeds]
    rows = {
        f"expert-choice, capacities {', '.join(f'{c:g}' for c in capacity)}, {more} steps": [
            final(run) for run in runs
        ],
        f"fixed recursion, {steps} steps": [final(run) for run in others],
    }
    return [
        *table(
            "(d) Mixture-of-Recursions against fixed recursion",
            f"The base's first and last layer stay, the 6 between become {LOOPS} loops over {6 // LOOPS}, at equal "
            "FLOPs. The router is measured as it serves, causally: by the threshold of its auxiliary router, not by "
            "the best of the sequence.",
            "held-out loss",
            rows,
        ),
        verdict("At equal FLOPs Mixture-of-Recursions has the lower loss", *rows.values()),
        "",
    ]


TEXT_STEPS = 2400


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results-train"))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", type=Path, help="a text file or a directory of them; default Python's own library")
    parser.add_argument("--report", type=Path, default=Path("docs/results.md"))
    args = parser.parse_args()
    prepare(args.out, args.scale, args.text)
    bench = Bench(args.out, args.scale, args.seeds)
    text = bench.train("text", "text-base", args.out / "text" / "empty", bench.steps(TEXT_STEPS), 0)
    words = args.text.name if args.text else "Python's standard library"
    lines = [
        "# Results of training",
        "",
        f"Made by `python bench/results_train.py --scale {args.scale:g} --seeds {args.seeds}` from the files of its "
        f"runs. The base models are plain Llamas of 8 layers, 96 wide where nothing else is said; a step has {TOKENS} "
        f"tokens, AdamW at 1e-3 with a cosine. The text is {words}, character by character; its base had "
        f"{bench.steps(TEXT_STEPS)} steps. Models this small and runs this short say how the methods compare here, not "
        "at the papers' sizes. FLOPs count 6 a parameter and token, without attention. Losses are nats a character. A "
        "claim holds where it does in every seed.",
        "",
    ]
    lines += [*relaxed(bench, text), *growing(bench, text), *routed(bench, text)]
    lines += retrofit(bench)
    args.report.write_text("\n".join(lines).rstrip() + "\n")
    print(f"written to {args.report}")


if __name__ == "__main__":
    main()
