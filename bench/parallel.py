"""Several tokens in flight: the exact wave and diffusion forcing against plain decoding, on a trained model.

    python -m bench.parallel [--out parallel-run] [--steps 2200] [--threads 2] [--batch 1,4,16] [--pictures docs/images]

A byte-level model (a core of 2 layers, 128 wide) learns running sums at random depths, by `loopwise` commands that are
not run again once they are done. Then held-out questions are answered at R = 32 by three
decoders, on the engine core without vLLM, and it prints: core passes a token (one after the other, and positions in
them), wall-clock against plain decoding (medians of interleaved pairs), the share of right answers, and the share of
answers that are those of plain decoding. Then: what waves without lanes for drafts cost plain requests that fill the
engine, on a wide model of random weights. `--pictures` draws two.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.serve import Engine, Params
from loopwise.serve.engine.diffusion_settings import DiffusionSettings

TERMS, R = 12, 32
ANSWER = 2 * TERMS - 1  # characters
CHAT = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content }}"
CHAT += "{% endgeneration %}{% endif %}{% endfor %}"
PLAIN = Params(max_tokens=ANSWER, num_recurrences=R, exit_rule="fixed", ignore_eos=True)
DECODERS = {
    "plain": PLAIN,
    "wave, W=8": replace(PLAIN, decoder="wave", max_in_flight=8),
    "diffusion, r'=4": replace(
        PLAIN, decoder="diffusion", max_in_flight=32, diffusion=DiffusionSettings(inner=4, headway=1)
    ),
    "diffusion, r'=4, headway 2": replace(
        PLAIN, decoder="diffusion", max_in_flight=32, diffusion=DiffusionSettings(inner=4, headway=2)
    ),
}


def sums(seed: int, count: int) -> list[tuple[str, str]]:
    """(question, answer): `TERMS` digits and their running sums modulo 10."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        terms = [draw.randrange(10) for _ in range(TERMS)]
        running = [sum(terms[: n + 1]) % 10 for n in range(TERMS)]
        found.append(("+".join(map(str, terms)) + "=", ",".join(map(str, running))))
    return found


def loopwise(*arguments: object) -> None:
    argv = [str(argument) for argument in arguments]
    print("loopwise", *argv, flush=True)
    subprocess.run([sys.executable, "-m", "loopwise", *argv], check=True, stdout=subprocess.DEVNULL)


def prepare(out: Path) -> None:
    """Questions with their answers, a tokenizer and an untrained plain model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    with (out / "train.jsonl").open("w") as file:
        for question, answer in sums(1, 100_000):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=CHAT)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # as large as the noise that states begin with
    model.save_pretrained(out / "empty")
    tokenizer.save_pretrained(out / "empty")


def trained(out: Path, steps: int) -> Path:
    """The model, made by commands that are skipped once they are done, and resumed where they were killed."""
    if not (out / "empty" / "tokenizer.json").is_file():
        prepare(out)
    if not (out / "converted" / "config.json").is_file():
        keys = ["sizes=1,2,1", "injection=linear", "state_init=normal", "state_std=0.3", "kv_policy=per-depth"]
        keys += [f"num_recurrences={R}", f"max_recurrences={R}"]
        loopwise("convert", out / "empty", out / "converted", *keys)
    if not (out / "model" / "config.json").is_file():
        keys = [f"data.train={out}/train.jsonl", "data.chat_field=messages", "data.separate_documents=true"]
        keys += [f"data.cache={out}/cache", f"data.sequence_length={4 * TERMS}", "batch_size=64"]
        keys += [f"steps={steps}", "log_every=50", "save_every=250", "keep_checkpoints=1"]
        keys += ["recurrence.mean=6", "recurrence.sampler=poisson-lognormal", "recurrence.backprop=4"]
        keys += ["optimiser.learning_rate=1e-3", "optimiser.warmup=0.05"]
        resume = ["--resume"] if (out / "model" / "train_recipe.yaml").is_file() else []
        loopwise("train", out / "converted", out / "model", *keys, *resume)
    return out / "model"


def compare(folder: Path, batches: list[int], pairs: int, count: int) -> None:
    """Every decoder at every batch: passes, items, time, and what comes out."""
    asked = sums(2, count)
    for batch in batches:
        engine = Engine(folder, max_num_seqs=batch, max_model_len=96, max_in_flight=32, dtype="float32")
        tokenizer = Tokens(folder)
        prompts, answers = [tokenizer.ids(q) for q, _ in asked], [a for _, a in asked]
        few = max(batch, min(count, 2 * batch))
        seconds: dict[str, list[float]] = {name: [] for name in DECODERS}
        done: dict[str, list[Any]] = {}
        timed(engine, prompts[:few], replace(PLAIN, max_tokens=2))  # caches fill
        prefill = timed(engine, prompts[:few], replace(PLAIN, max_tokens=1))[0]
        for _ in range(pairs):
            for name, params in DECODERS.items():
                took, done[name] = timed(engine, prompts[:few], params)
                seconds[name].append(took - prefill)
        for name, params in DECODERS.items():
            if batch == batches[-1] and count > few:
                done[name] = engine.generate(prompts, params)
            got = done[name]
            plain = [c.tokens for c in done["plain"]]
            tokens = sum(len(c.tokens) - 1 for c in got)
            ratio = statistics.median(p / s for p, s in zip(seconds["plain"], seconds[name], strict=True))
            right = sum(tokenizer.text(c.tokens) == a for c, a in zip(got, answers, strict=False)) / len(got)
            same = sum(c.tokens == p for c, p in zip(got, plain, strict=True)) / len(got)
            alike = sum(a == b for c, p in zip(got, plain, strict=True) for a, b in zip(c.tokens, p, strict=True))
            passes, items = (sum(getattr(c, what) for c in got) / tokens for what in ("passes", "items"))
            print(
                f"batch {batch:2}  {name:27} {passes:6.2f} passes/token ({R / passes:5.2f}x fewer)  {items:6.2f} items "
                f"time {ratio:5.2f}x  right {right:6.1%}  as plain {same:6.1%} "
                f"(tokens {alike / (len(got) * ANSWER):6.1%})",
                flush=True,
            )


class Tokens:
    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))


def timed(engine: Engine, prompts: list[list[int]], params: Any) -> tuple[float, list[Any]]:
    began = time.perf_counter()
    done = engine.generate(prompts, params)
    return time.perf_counter() - began, done


def crowded(pairs: int, rows: int = 16) -> None:
    """Plain requests fill all rows but two, whose requests are plain, or waves under a budget of as many lanes as rows.
    That leaves each wave one position, whatever it guesses: the figure is what a wave without lanes costs. Of random
    weights, at R = 8."""
    from transformers import LlamaConfig

    torch.manual_seed(0)
    source = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=2688, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    config = RecurrentDepthConfig(source_config=source, core=[0, 1, 2, 3], num_recurrences=8)
    model = RecurrentDepthForCausalLM(config).eval().to(torch.bfloat16)
    engine = Engine(model, max_num_seqs=rows, max_model_len=96, max_in_flight=8, budget=rows, kv_policy="last-exited")
    draw = random.Random(3)
    prompts = [[draw.randrange(1024) for _ in range(24)] for _ in range(rows)]
    plain = Params(max_tokens=24, ignore_eos=True)
    ratios = []
    for _ in range(pairs):
        took = [
            timed(engine, prompts, [plain] * (rows - 2) + [replace(plain, decoder=d)] * 2)[0] for d in ("plain", "wave")
        ]
        ratios.append(took[0] / took[1])
    print(
        f"{rows - 2} plain requests and 2 waves of one position: {statistics.median(ratios):.1%} of the throughput of "
        f"{rows} plain requests ({min(ratios):.1%} to {max(ratios):.1%})"
    )


def pictures(folder: Path, to: Path) -> None:
    """parallel-frozen.png: tokens out after every pass; parallel-wave.png: which position is how deep in which pass."""
    from matplotlib.figure import Figure

    engine = Engine(folder, max_num_seqs=1, max_model_len=96, max_in_flight=32, dtype="float32")
    tokens = Tokens(folder)
    question, _ = sums(4, 1)[0]
    first = len(tokens.ids(question))
    frozen = Figure(figsize=(7, 3), layout="constrained")
    axes = frozen.subplots()
    seen: dict[str, Any] = {}
    for name, params in DECODERS.items():
        loop, out, depths = engine.loop, [], []
        tick = loop.tick

        def noted(most: int, tick: Any = tick, out: Any = out, depths: Any = depths, loop: Any = loop) -> Any:
            own, lanes = slice(0, loop.state.num_decode_lanes), loop.state.lanes
            went = tick(most)
            if bool(loop.state.requests.next_position[0] > 0):
                out.append(max(int(loop.state.requests.next_position[0]) - first, 0))
                on = (lanes.running[own] | lanes.uncommitted[own]).nonzero().squeeze(1)
                depths.append({int(lanes.position[n]) - first: int(lanes.depth[n]) for n in on})
            return went

        loop.tick = noted
        text = tokens.text(engine.generate([tokens.ids(question)], params)[0].tokens)
        loop.tick = tick
        seen[name] = (out, depths, text)
        axes.step(range(len(out)), out, where="post", label=name)
    axes.set(xlabel="passes of the core", ylabel="tokens out", xscale="log")
    axes.legend()
    frozen.savefig(to / "parallel-frozen.png", dpi=80)
    out, depths, text = seen["wave, W=8"]
    grid = torch.full((len(depths), ANSWER), float("nan"))
    for n, at in enumerate(depths):
        for position, depth in at.items():
            if 0 <= position < ANSWER:
                grid[n, position] = depth
    wave = Figure(figsize=(7, 4), layout="constrained")
    axes = wave.subplots()
    picture = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set(xlabel="token", ylabel="pass of the core")
    axes.set_xticks(range(len(text)), list(text))
    wave.colorbar(picture, label="recurrences so far")
    wave.savefig(to / "parallel-wave.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("parallel-run"))
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--count", type=int, default=100, help="held-out questions at the last batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pictures", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = trained(args.out, args.steps)
    compare(folder, [int(n) for n in args.batch.split(",")], args.pairs, args.count)
    crowded(args.pairs)
    if args.pictures:
        pictures(folder, args.pictures)


if __name__ == "__main__":
    main()
