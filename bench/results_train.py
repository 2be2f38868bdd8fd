"""The papers' orderings on small models, with seeds and error bars: writes docs/results.md.

    python bench/results_train.py [--out results-train] [--scale 1.0] [--seeds 3] [--text PATH] [--report FILE]

Everything is a `loopwise` command; a finished one is not run again, a killed one goes on (`--resume`). `--scale`
multiplies all steps; 1.0 is meant for less than an hour of one quiet core. Every figure is read from the
runs' files; the sentences under each table follow from the figures.

(a) stepwise tying + SVD LoRA + distillation, tying alone, random start     held-out loss beside the source's
(b) a curriculum of recurrences, all recurrences from the start             held-out loss at equal FLOPs, FLOPs at equal
                                                                            held-out loss
(c) a retrofitted model, the plain one trained on                           right answers by hops and R, at equal FLOPs
(d) Mixture-of-Recursions, fixed recursion                                  held-out loss at equal FLOPs

(a), (b) and (d) learn text, character by character; (c) learns chains of assignments, `task:hops`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from loopwise.cli import main as command
from loopwise.errors import UserError
from loopwise.evaluation.loss import evaluate
from loopwise.train.fitting import curriculum
from loopwise.train.measure import parameter_costs, token_flops
from loopwise.train.output import RECIPE
from loopwise.train.pretrained import load_config, load_model
from loopwise.train.recipe import Evaluate, Train
from loopwise.train.schedule import Schedule

TOKENS = 1024  # in a batch
LENGTH, HEADS, RATE = 128, 3, 1e-3  # of the text's blocks; of width 32
LOOPS, MEAN, DEPTHS = 2, 4, [1, 2, 3, 4, 6, 8]
ASKED = "task:hops?hops=0..4+6+8+10+12+16&lookups=0&questions=1&statements=18&records=2000"
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))


def read_documents(text: Path | None) -> Iterator[str]:
    """The texts to learn from. Raises UserError where there are none, or too few."""
    if text is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "site-packages", "idle_test", "lib2to3"}
        files = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
    elif text.is_dir():
        files = [p for p in sorted(text.rglob("*")) if p.is_file()]
    elif text.is_file():
        files = [text]
    else:
        raise UserError(f"{text}: no such file or directory")
    size = 0
    for file in files:
        try:
            document = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        size += len(document)
        if text is not None and len(files) == 1:  # one long file: paragraphs, so that some can be held out
            yield from (part for part in document.split("\n\n") if part.strip())
        elif document.strip():
            yield document
    if size < 1_000_000:
        raise UserError(f"{text}: {size:,} characters of text; at least 1,000,000 are needed")


def split(documents: list[str], out: Path) -> tuple[Path, Path]:
    """Write train.jsonl and held_out.jsonl: every 20th document is held out, up to 150_000."""
    held, kept, size = [], [], 0
    for number, document in enumerate(documents):
        if number % 20 == 10 and size < 150_000:
            held.append(document)
            size += len(document)
        else:
            kept.append(document)
    paths = out / "train.jsonl", out / "held_out.jsonl"
    for path, texts in zip(paths, (kept, held), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths


def prepare(out: Path, scale: float, text: Path | None) -> None:
    """Records of text, and an untrained plain model with a tokenizer of characters."""
    folder = out / "text"
    if (folder / "empty" / "tokenizer.json").is_file():
        return
    (folder / "empty").mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(["<eos>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32 * HEADS,
        intermediate_size=32 * HEADS * 8 // 3,
        num_hidden_layers=8,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=128,
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "empty")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder / "empty")
    written = (
        document.translate({ord(c): None for c in set(document) - set(CHARACTERS)}) for document in read_documents(text)
    )
    _, held_out = split(list(written), out / "text")
    # They are measured often.
    short = [json.loads(record)["text"][1000:5000] for record in held_out.read_text().splitlines()]
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in short if text))


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

    def train(self, name: str, model: Path, steps: int, seed: int, *settings: str) -> Path:
        """A run on the text."""
        data = [f"data.cache={self.out}/cache", f"data.sequence_length={LENGTH}"]
        data += [f"data.train={self.out}/text/train.jsonl", f"data.eval={self.out}/text/held_out.jsonl"]
        rate = [f"batch_size={TOKENS // LENGTH}", f"optimiser.learning_rate={RATE}", "optimiser.warmup=0.05"]
        return self.run(name, model, steps, seed, *data, *rate, *settings)

    def run(self, name: str, model: Path, steps: int, seed: int, *settings: str) -> Path:
        target = self.out / f"{name}-{seed}"
        if not (target / "config.json").is_file():
            keep = [f"save_every={max(1, steps // 3)}", f"log_every={max(1, steps // 20)}", "keep_checkpoints=1"]
            resume = ["--resume"] if (target / RECIPE).is_file() else []
            loopwise("train", model, target, f"steps={steps}", f"seed={seed}", *keep, *settings, *resume, makes=target)
        return target

    def steps_worth(self, run: Path, flops_of_a_step: float) -> int:
        """Steps at that price that cost as much as `run` did."""
        return max(8, round(spent(run)[-1] / flops_of_a_step))


@cache
def costs(model: Path) -> tuple[int, int]:
    return parameter_costs(load_model(str(model)))


def price(model: Path, passes: float, tokens: int = TOKENS) -> float:
    """FLOPs of a step of `model` whose tokens go through the core so many times, all with gradient."""
    once, recurring = costs(model)
    return tokens * 6 * (once + passes * recurring)


@cache
def spent(run: Path) -> np.ndarray:
    """FLOPs of a run up to each of its steps, the first 0: from its recipe and its model."""
    recipe = Train.model_validate(yaml.safe_load((run / RECIPE).read_text()))
    steps, tokens = recipe.steps or 0, recipe.batch_size * recipe.data.sequence_length
    config = load_config(str(run), None)
    course, router = curriculum(config, recipe, steps), getattr(config, "router", None)
    warmup = round(((recipe.recurrence and recipe.recurrence.capacity_warmup) or 0) * steps)
    one = [token_flops(costs(run), course.at(s) if course else None, router, s, warmup) for s in range(steps)]
    return tokens * np.cumsum([0, *one])


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
        rows[name] = [final(bench.train(f"a{number}", model, steps, seed, *keys)) for seed in bench.seeds]
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

    full = [bench.train("b-full", model, full_steps, seed, *keys, often(full_steps)) for seed in bench.seeds]
    mean = statistics.mean(Schedule(MEAN, full_steps, "1-sqrt").at(step) for step in range(full_steps))
    steps = bench.steps_worth(full[0], price(model, mean))
    ramp = [*keys, "recurrence.schedule=1-sqrt", often(steps)]
    grown = [bench.train("b-curriculum", model, steps, seed, *ramp) for seed in bench.seeds]
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


def chains(bench: Bench) -> list[str]:
    """The recipes hops-base and hops: the retrofitted model, and its base trained on for the same FLOPs."""
    empty = bench.out / "chains-empty"
    if not empty.is_dir():
        loopwise("init", "task:hops", empty, makes=empty)
    found: dict[str, list[list[float]]] = {}  # right answers in %, of each seed by group and over all
    steps, flops = [], []
    for seed in bench.seeds:
        base = bench.run("chains-base", empty, bench.steps(300), seed, "--recipe=hops-base")
        model = bench.convert(f"chains-converted-{seed}", base, "sizes=1,1,0", "injection=linear", "num_recurrences=8")
        run = bench.run("chains", model, bench.steps(1000), seed, "--recipe=hops")
        steps.append(bench.steps_worth(run, price(base, 0, tokens=32 * 64)))
        flops.append(spent(run)[-1])
        plain = bench.run("chains-plain", base, steps[-1], seed, "--recipe=hops", "recurrence=null")
        for name, path, depths in (("the base", base, None), ("", run, DEPTHS), ("plain", plain, None)):
            result = evaluate(str(path), Evaluate(data=[ASKED], group="hops", num_recurrences=depths))
            for row in result["results"]:
                shares = [*(group["accuracy"] for group in row["groups"].values()), row["accuracy"]]
                found.setdefault(name or f"R = {row['num_recurrences']}", []).append([100 * share for share in shares])
    groups, plain = list(row["groups"]), found.pop("plain")
    rows = {name if name == "the base" else f"retrofitted, {name}": each for name, each in found.items()}
    rows[f"plain, about {round(statistics.mean(steps))} steps more"] = plain
    overall = [[of_seed[-1] for of_seed in found[f"R = {r}"]] for r in DEPTHS]
    wrong = [[100 - right for right in of_all] for of_all in (overall[-1], [of_seed[-1] for of_seed in plain])]
    return [
        "## (c) Chains of assignments: what depth buys",
        "",
        "`c=b;a=7;x=4;b=a;?c=7`: each answer is some hops away, 0 are lookups. The base of 2 layers, 128 wide, learned "
        "lookups (recipe `hops-base`); then it learns chains of up to 8 hops, retrofitted with 1 prelude and 1 core "
        f"layer for {bench.steps(1000)} steps (recipe `hops`), or as it is for the same {statistics.mean(flops):.2e} "
        f"FLOPs. Right answers in % to `{ASKED}`: 200 held-out problems a group, standard error up to 3.5; more than 8 "
        f"hops were never trained. Mean over {len(steps)} seed{'s' * (len(steps) > 1)}.",
        "",
        "| hops | " + " | ".join(groups) + " | all |",
        "|---|" + "---|" * (len(groups) + 1),
        *(
            f"| {name} | " + " | ".join(f"{statistics.mean(cell):.1f}" for cell in zip(*each, strict=True)) + " |"
            for name, each in rows.items()
        ),
        "",
        verdict(f"Retrofitted, at R = {DEPTHS[-1]}, has fewer wrong answers (%) than plain", *wrong),
        f"- All groups at R = {', '.join(map(str, DEPTHS))}: {', '.join(spread(x, '.1f') for x in overall)} %.",
        "",
    ]


def routed(bench: Bench, base: Path) -> list[str]:
    steps = bench.steps(150)
    fixed = bench.convert("d-fixed", base, "method=recursive", f"loops={LOOPS}", "sharing=middle-cycle")
    others = [bench.train("d-fixed", fixed, steps, seed) for seed in bench.seeds]
    model = bench.convert("d-mor", base, "method=mor", f"loops={LOOPS}", "router.auxiliary=true")
    capacity = load_config(str(model), None).router["capacity"]
    # Over a warm-up of a tenth of the steps the capacity is half-way between 1 and its end on average.
    more = bench.steps_worth(others[0], price(model, 0.95 * sum(capacity) + 0.05 * len(capacity)))
    keys = ["objectives.router.auxiliary=0.001", "recurrence.capacity_warmup=0.1"]
    runs = [bench.train("d-mor", model, more, seed, *keys) for seed in bench.seeds]
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
    text = bench.train("text-base", args.out / "text" / "empty", bench.steps(TEXT_STEPS), 0)
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
    lines += chains(bench)
    args.report.write_text("\n".join(lines).rstrip() + "\n")
    print(f"written to {args.report}")


if __name__ == "__main__":
    main()
