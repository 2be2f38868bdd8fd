"""The papers' orderings on a small model that learns sums, with seeds and error bars: writes docs/results.md.

    python bench/results_train.py [--out results-train] [--scale 1.0] [--seeds 3] [--report docs/results.md]

Everything is a `loopwise` command; a finished one is not run again, a killed one goes on (`--resume`). `--scale`
multiplies all steps; 1.0 is meant for about two hours on two quiet cores. Every figure is read from the runs' files.

(a) stepwise tying + SVD LoRA + distillation, tying alone, random start     held-out loss beside the source's
(b) a curriculum of recurrences, all recurrences from the start             held-out loss at equal FLOPs
(c) a retrofitted model, the plain one trained on                           accuracy at equal FLOPs, and by R
(d) Mixture-of-Recursions, fixed recursion                                  held-out loss at equal FLOPs
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from loopwise.train.pretrained import load_model
from loopwise.train.trainer import parameter_costs

LENGTH, BATCH, TERMS, DEPTHS = 64, 16, 4, [1, 2, 4, 8]
MEAN, LOOPS = 4, 2


def problems(seed: int, count: int) -> list[str]:
    """Sums of `TERMS` numbers below 100, modulo 100: '37+58+12+90=97'."""
    rng = random.Random(seed)
    drawn = ([rng.randrange(100) for _ in range(TERMS)] for _ in range(count))
    return ["+".join(f"{n:02d}" for n in numbers) + f"={sum(numbers) % 100:02d}" for numbers in drawn]


def prepare(out: Path, scale: float) -> None:
    """Text, tokenizer and an untrained plain model."""
    if (out / "empty" / "tokenizer.json").is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, seed, count in (("train", 1, max(2000, round(200_000 * scale))), ("held_out", 2, 1_000)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in problems(seed, count)))
    vocabulary = {token: i for i, token in enumerate(["<eos>", *"0123456789+="])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=128,
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out / "empty")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(out / "empty")


def loopwise(*arguments: object) -> None:
    argv = [str(argument) for argument in arguments]
    print("loopwise", *argv, flush=True)
    subprocess.run([sys.executable, "-m", "loopwise", *argv], check=True, stdout=subprocess.DEVNULL)


class Bench:
    def __init__(self, out: Path, scale: float, seeds: int):
        self.out, self.scale, self.seeds = out, scale, range(seeds)

    def steps(self, count: float) -> int:
        return max(4, round(count * self.scale))

    def convert(self, name: str, source: Path, *settings: str) -> Path:
        target = self.out / name
        if not (target / "config.json").is_file():
            loopwise("convert", source, target, *settings)
        return target

    def train(self, name: str, model: Path, steps: int, seed: int, *settings: str) -> Path:
        target = self.out / f"{name}-{seed}"
        if not (target / "config.json").is_file():
            data = [
                f"data.train={self.out}/train.jsonl",
                f"data.eval={self.out}/held_out.jsonl",
                f"data.cache={self.out}/cache",
            ]
            sizes = [f"data.sequence_length={LENGTH}", f"batch_size={BATCH}", f"steps={steps}", f"seed={seed}"]
            keep = [f"save_every={max(1, steps // 4)}", f"log_every={max(1, steps // 20)}", "keep_checkpoints=1"]
            rate = ["optimiser.learning_rate=1e-3", "optimiser.warmup=0.05"]
            resume = ["--resume"] if (target / "train_recipe.yaml").is_file() else []
            loopwise("train", model, target, *data, *sizes, *keep, *rate, *settings, *resume)
        return target

    def equal(self, run: Path, model: Path, recurrences: float) -> int:
        """Steps of `model`, with gradient through `recurrences`, that cost as much as `run` did."""
        once, recurring = parameter_costs(load_model(str(model)))
        spent = json.loads((run / "trainer_state.json").read_text())["total_flos"]
        return max(4, round(spent / (BATCH * LENGTH * 6 * (once + recurrences * recurring))))


def held_out(run: Path, recurrences: int | None = None) -> float:
    """The last held-out loss of a run, at R or at the deepest that it measured."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    found = [record for record in log if any(name.startswith("eval_loss") for name in record)][-1]
    names = [name for name in found if name.startswith("eval_loss")]
    if recurrences is not None:
        return found[f"eval_loss_r{recurrences}"]
    return found[max(names, key=lambda name: int(name.rpartition("_r")[2]) if "_r" in name else 0)]


@torch.no_grad()
def accuracy(run: Path, recurrences: int | None) -> float:
    """Share of held-out sums whose two digits a greedy decoder would both get right."""
    model: Any = load_model(str(run)).eval()
    digits = {token: i for i, token in enumerate("0123456789+=", 1)}
    ids = torch.tensor([[digits[c] for c in problem] for problem in problems(2, 1_000)])
    keys = {"num_recurrences": recurrences} if recurrences else {}
    guess = model(input_ids=ids[:, :-1], use_cache=False, **keys).logits[:, -2:].argmax(-1)
    return (guess == ids[:, -2:]).all(1).float().mean().item()


def line(name: str, values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"| {name} | {statistics.mean(values):.4f} ± {spread:.4f} | {', '.join(f'{v:.4f}' for v in values)} |"


def table(title: str, metric: str, rows: dict[str, list[float]]) -> list[str]:
    head = [f"## {title}", "", f"| | {metric}, mean ± sd | each seed |", "|---|---|---|"]
    return [*head, *(line(name, values) for name, values in rows.items()), ""]


def relaxed(bench: Bench, base: Path) -> list[str]:
    steps = bench.steps(600)
    lora = ["lora.rank=16", "lora.init=svd"]
    kinds = {
        "stepwise + SVD LoRA + distillation": (["init=stepwise", *lora], True),
        "stepwise, tied alone": (["init=stepwise"], False),
        "random start, tied alone": (["init=random"], False),
    }
    rows: dict[str, list[float]] = {"the source": [held_out(base)]}
    for number, (name, (settings, distil)) in enumerate(kinds.items()):
        model = bench.convert(f"a{number}", base, "method=recursive", f"loops={LOOPS}", *settings)
        teacher = [f"objectives.distillation.teacher={base}", "objectives.cross_entropy=0.5"] if distil else []
        rows[name] = [held_out(bench.train(f"a{number}", model, steps, seed, *teacher)) for seed in bench.seeds]
    return table(f"(a) What tying took away, after {steps} steps", "held-out loss", rows)


def curriculum(bench: Bench, retrofitted: Path) -> list[str]:
    keys = [f"recurrence.mean={MEAN}", "recurrence.schedule=1-sqrt"]
    runs = [bench.train("b-curriculum", retrofitted, bench.steps(600), seed, *keys) for seed in bench.seeds]
    steps = bench.equal(runs[0], retrofitted, MEAN)
    full = [bench.train("b-full", retrofitted, steps, seed, f"recurrence.mean={MEAN}") for seed in bench.seeds]
    rows = {
        f"1-sqrt curriculum to R = {MEAN}": [held_out(run) for run in runs],
        f"R = {MEAN} from the start ({steps} steps)": [held_out(run) for run in full],
    }
    return table("(b) A curriculum at equal FLOPs", "held-out loss", rows)


def retrofit(bench: Bench, base: Path, retrofitted: Path) -> list[str]:
    keys = [f"recurrence.mean={MEAN}", "recurrence.schedule=linear", "recurrence.sampler=poisson-lognormal"]
    runs = [bench.train("c-retrofit", retrofitted, bench.steps(1200), seed, *keys) for seed in bench.seeds]
    steps = bench.equal(runs[0], base, 0)
    plain = [bench.train("c-plain", base, steps, seed) for seed in bench.seeds]
    rows = {f"plain, trained on for {steps} steps": [accuracy(run, None) for run in plain]}
    rows |= {f"retrofitted, R = {r}": [accuracy(run, r) for run in runs] for r in DEPTHS}
    return table("(c) Retrofitted against plain at equal training FLOPs", "accuracy on sums", rows)


def routed(bench: Bench, base: Path) -> list[str]:
    model = bench.convert("d-mor", base, "method=mor", f"loops={LOOPS}", "router.auxiliary=true")
    fixed = bench.convert("d-fixed", base, "method=recursive", f"loops={LOOPS}", "sharing=middle-cycle")
    steps = bench.steps(600)
    keys = ["objectives.router.auxiliary=0.001", "recurrence.capacity_warmup=0.1"]
    runs = [bench.train("d-mor", model, steps, seed, *keys) for seed in bench.seeds]
    # Capacities 1, 1/2, ..: a token meets the core (LOOPS + 1) / 2 times on average, fixed recursion LOOPS times.
    fewer = round(steps * (1 + (LOOPS + 1) / 2) / (1 + LOOPS))
    other = [bench.train("d-fixed", fixed, max(4, fewer), seed) for seed in bench.seeds]
    rows = {
        f"expert-choice, {steps} steps": [held_out(run) for run in runs],
        f"fixed recursion, {fewer} steps": [held_out(run) for run in other],
    }
    return table("(d) Mixture-of-Recursions against fixed recursion, about equal FLOPs", "held-out loss", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results-train"))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", type=Path, default=Path("docs/results.md"))
    args = parser.parse_args()
    prepare(args.out, args.scale)
    bench = Bench(args.out, args.scale, args.seeds)
    base = bench.train("base", args.out / "empty", bench.steps(3000), 0)
    retrofitted = bench.convert("retrofitted", base, "sizes=2,4,2", "injection=linear", f"num_recurrences={MEAN}")
    lines = [
        "# Results of training",
        "",
        f"Made by `python bench/results_train.py --scale {args.scale:g} --seeds {args.seeds}` from the files of its",
        f"runs: a plain Llama of 8 layers, 96 wide, learns sums of {TERMS} two-digit numbers modulo 100",
        f"({bench.steps(3000)} steps of {BATCH} x {LENGTH} tokens), and is converted and retrained. FLOPs are counted",
        "as 6 a parameter and token.",
        "",
    ]
    lines += [*relaxed(bench, base), *curriculum(bench, retrofitted)]
    lines += [*retrofit(bench, base, retrofitted), *routed(bench, base)]
    args.report.write_text("\n".join(lines).rstrip() + "\n")
    print(f"written to {args.report}")


if __name__ == "__main__":
    main()
