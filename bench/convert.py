"""Time and memory of `loopwise convert` on a checkpoint far larger than its memory bound, beside `cp`.

    python bench/convert.py [--gigabytes 8] [--pairs 3] [--folder DIR]

Makes a random bf16 Llama of that size in shards, then alternates `cp` of the bytes that a conversion writes with
conversions: without verification, with it, and with SVD LoRA of rank 16. Prints seconds, their ratio to `cp`, and the
peak of resident anonymous memory (pages of the file cache do not count). Needs three times the size on the disk.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from loopwise.convert.source_config import empty_model
from loopwise.convert.write import Pending, write_weights


def make_source(folder: Path, gigabytes: float) -> int:
    """A random bf16 Llama of about that size with an even number of layers; returns how many."""
    config = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=32000,
        num_hidden_layers=2,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    layer = 2 * (2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192)
    config.num_hidden_layers = max(2, round((gigabytes * 1e9 - 4 * 32000 * 3072) / layer / 2) * 2)
    with torch.device("meta"):
        model = empty_model(config)
    noise = (torch.randn(1 << 24) * 0.02).bfloat16()

    def values(shape: list[int]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return noise.repeat(count // len(noise) + 1)[:count].view(shape)

    folder.mkdir()
    tensors = [
        Pending(name, torch.bfloat16, list(tensor.shape), lambda shape=list(tensor.shape): values(shape))
        for name, tensor in model.state_dict().items()
    ]
    write_weights(tensors, folder, show_progress=sys.stderr.isatty(), shard_bytes=int(gigabytes * 1e9 / 4))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return config.num_hidden_layers


def measured(argv: list[str]) -> tuple[float, float]:
    """(seconds, peak resident anonymous GiB) of a command."""
    start = time.monotonic()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
        except (FileNotFoundError, ProcessLookupError, TypeError):
            pass
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)}: exit code {process.returncode}")
    return time.monotonic() - start, peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--only", choices=["plain", "verified", "svd"], help="measure this one only")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        layers = make_source(work / "source", args.gigabytes)
        every = [f"sizes=2,{layers - 4},2", "injection=none"]
        ways = {
            "plain": [*every, "--no-verify"],
            "verified": every,
            "svd": ["method=recursive", "loops=2", "lora.rank=16", "--no-verify"],
        }
        copied, results = [], {name: [] for name in ways if args.only in (None, name)}
        for pair in range(args.pairs):
            for name, keys in ways.items():
                if name not in results or (name == "svd" and pair):  # minutes of singular values: once
                    continue
                command = [sys.executable, "-m", "loopwise", "convert", str(work / "source"), str(work / "out"), *keys]
                if name == "plain":
                    seconds, _ = measured(["cp", "-r", str(work / "source"), str(work / "copy")])
                    copied.append(seconds)
                    shutil.rmtree(work / "copy")
                results[name].append(measured(command))
                size = sum(file.stat().st_size for file in (work / "out").glob("*.safetensors"))
                shutil.rmtree(work / "out")
                print(f"pair {pair + 1}: {name} {results[name][-1][0]:.1f} s for {size / 1e9:.2f} GB", flush=True)
        cp = statistics.median(copied) if copied else float("nan")
        print(f"\n{'':<10}{'seconds':>9}{'x cp':>7}{'peak GiB':>10}\n{'cp':<10}{cp:>9.1f}")
        for name, runs in results.items():
            seconds = statistics.median(run[0] for run in runs)
            print(f"{name:<10}{seconds:>9.1f}{seconds / cp:>7.2f}{max(run[1] for run in runs):>10.2f}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
