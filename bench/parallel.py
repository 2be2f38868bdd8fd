"""Several tokens in flight: the exact wave and diffusion forcing against plain decoding, on a trained model.

    python bench/parallel.py [--out parallel-run] [--steps 2500] [--threads 2] [--recurrences 32]

A byte-level model (a core of 4 layers, 128 wide) learns running sums and Python's own library at random depths, by
`loopwise` commands that are not run again once they are done.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

TERMS = 8


def sums(seed: int, count: int) -> list[tuple[str, str]]:
    """(question, answer): `TERMS` two-digit numbers and their running sums modulo 100, units first."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        terms = [draw.randrange(100) for _ in range(TERMS)]
        running = [sum(terms[: n + 1]) % 100 for n in range(TERMS)]
        question, answer = (
            "".join(f"{n % 10}{n // 10}{mark}" for n in some) for some, mark in ((terms, "+"), (running, ","))
        )
        found.append((question[:-1] + "=", answer[:-1]))
    return found


def loopwise(*arguments: object) -> None:
    argv = [str(argument) for argument in arguments]
    print("loopwise", *argv, flush=True)
    subprocess.run([sys.executable, "-m", "loopwise", *argv], check=True, stdout=subprocess.DEVNULL)


def prepare(out: Path) -> None:
    """Text, tokenizer and an untrained plain model."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from loopwise.demo import read_documents, split

    out.mkdir(parents=True, exist_ok=True)
    train, _ = split(list(read_documents(None)), out)
    text = train.read_text()[: 6 << 20].rpartition("\n")[0].splitlines()
    learned = [json.dumps({"text": q + a}) for q, a in sums(1, 100_000)]
    mixed = text + learned
    random.Random(0).shuffle(mixed)
    train.write_text("\n".join(mixed) + "\n")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(out / "empty")
    tokenizer.save_pretrained(out / "empty")


def trained(out: Path, steps: int, recurrences: int) -> Path:
    """The model, made by commands that are skipped once they are done, and resumed where they were killed."""
    if not (out / "empty" / "tokenizer.json").is_file():
        prepare(out)
    if not (out / "converted" / "config.json").is_file():
        keys = ["sizes=1,4,1", "injection=linear", "state_init=normal", "kv_policy=per-depth"]
        keys += [f"num_recurrences={recurrences}", f"max_recurrences={recurrences}"]
        loopwise("convert", out / "empty", out / "converted", *keys)
    if not (out / "model" / "config.json").is_file():
        keys = [f"data.train={out}/train.jsonl", f"data.cache={out}/cache", "data.sequence_length=128", "batch_size=16"]
        keys += [f"steps={steps}", "log_every=50", "save_every=250", "keep_checkpoints=1"]
        keys += ["recurrence.mean=6", "recurrence.sampler=poisson-lognormal", "recurrence.backprop=4"]
        keys += ["optimiser.learning_rate=3e-3", "optimiser.warmup=0.05"]
        resume = ["--resume"] if (out / "model" / "train_recipe.yaml").is_file() else []
        loopwise("train", out / "converted", out / "model", *keys, *resume)
    return out / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("parallel-run"))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--recurrences", type=int, default=32)
    args = parser.parse_args()
    trained(args.out, args.steps, args.recurrences)


if __name__ == "__main__":
    main()
