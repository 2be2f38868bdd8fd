"""Time and memory of `loopwise convert` on a checkpoint far larger than its memory bound, beside `cp`.

    python -m bench.convert [--gigabytes 8] [--pairs 3] [--folder DIR]
    python -m bench.convert --shape 70b --only plain svd --workers 1 2

Makes a random bf16 Llama in shards: of a 3B's layers and that size, or of a 70B's layers, of which there are 4. Then it
alternates `cp` of the bytes that a conversion writes with conversions: without verification, with it, with SVD LoRA,
and with SVD LoRA and verification. Prints seconds, their ratio to `cp`, and the peak memory of all processes: resident
anonymous pages, and in brackets all resident pages, of which those of mapped files may be dropped at any time. For 70b,
it adds the time of 80 layers as extrapolated. Needs three times the size on the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from loopwise.convert.pending import Pending
from loopwise.convert.source_config import empty_model
from loopwise.convert.write import write_weights

SHAPES: dict[str, dict[str, Any]] = {
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "vocab_size": 32000},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "vocab_size": 8192},
}
LAYERS, WHOLE = 4, 80  # layers of the 70b source, and of the model that it stands for


def make_source(folder: Path, shape: str, gigabytes: float) -> int:
    """A random bf16 Llama with an even number of layers, of about that size for 3b; returns how many."""
    config = LlamaConfig(**SHAPES[shape], num_key_value_heads=8, num_hidden_layers=LAYERS, dtype="bfloat16")
    config.max_position_embeddings = 2048
    if shape == "3b":
        layer = 2 * (2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192)
        config.num_hidden_layers = max(2, round((gigabytes * 1e9 - 4 * 32000 * 3072) / layer / 2) * 2)
    with torch.device("meta"):
        model = empty_model(config)
    noise = (torch.randn((1 << 24) + 1) * 0.02).bfloat16()

    def values(name: str, shape: list[int]) -> torch.Tensor:
        """Noise that begins elsewhere for every tensor: equal layers would be noticed."""
        count, start = torch.Size(shape).numel(), zlib.crc32(name.encode()) % len(noise)
        return noise.roll(start).repeat(count // len(noise) + 1)[:count].view(shape)

    folder.mkdir()
    tensors = [
        Pending(name, torch.bfloat16, list(tensor.shape), lambda n=name, s=list(tensor.shape): values(n, s))
        for name, tensor in model.state_dict().items()
    ]
    size = sum(tensor.bytes for tensor in tensors)
    write_weights(tensors, folder, show_progress=sys.stderr.isatty(), shard_bytes=size // 4)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return config.num_hidden_layers


def processes(pid: int) -> list[int]:
    """Process `pid` and those that descend from it."""
    found = [pid]
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in thread.read_text().split():
            found += processes(int(child))
    return found


def resident(pid: int) -> tuple[int, int]:
    """KiB of resident anonymous memory, and of all resident memory, of a process and its descendants."""
    anonymous = everything = 0
    try:
        for process in processes(pid):
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            sizes = {key: int(value.split()[0]) for key, _, value in (x.partition(":") for x in lines) if "Rss" in key}
            anonymous, everything = anonymous + sizes.get("RssAnon", 0), everything + sum(sizes.values())
    except OSError:  # one has ended
        pass
    return anonymous, everything


def measured(argv: list[str]) -> tuple[float, float, float]:
    """(seconds, peak GiB of resident anonymous memory, peak GiB of resident memory) of a command."""
    start = time.monotonic()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    peak = [0, 0]
    while process.poll() is None:
        peak = [max(pair) for pair in zip(peak, resident(process.pid), strict=True)]
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)}: exit code {process.returncode}")
    return time.monotonic() - start, peak[0] / 2**20, peak[1] / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--gigabytes", type=float, default=8, help="size of the source, for 3b")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    names = ["plain", "verified", "svd", "svd-verified"]
    parser.add_argument("--only", choices=names, nargs="+", default=names[:3], help="measure these")
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        layers = make_source(work / "source", args.shape, args.gigabytes)
        every = [f"sizes=1,{layers - 2},1", "injection=none"]
        low_rank = ["method=recursive", "loops=2", "init=average", f"lora.rank={16 if args.shape == '3b' else 64}"]
        ways = {"plain": [*every, "--no-verify"], "verified": every}
        ways |= {"svd": [*low_rank, "--no-verify"], "svd-verified": low_rank}
        runs = [(name, workers) for name in names if name in args.only for workers in args.workers]
        copied: list[float] = []
        results: dict[tuple[str, int], list[tuple[float, float, float]]] = {run: [] for run in runs}
        for pair in range(args.pairs):
            seconds, *_ = measured(["cp", "-r", str(work / "source"), str(work / "copy")])
            copied.append(seconds)
            shutil.rmtree(work / "copy")
            for name, workers in runs:
                if name.startswith("svd") and pair:  # minutes of singular values: once
                    continue
                command = [sys.executable, "-m", "loopwise", "convert", str(work / "source"), str(work / "out")]
                found = measured([*command, *ways[name], f"workers={workers}"])
                results[name, workers].append(found)
                size = sum(file.stat().st_size for file in (work / "out").glob("*.safetensors"))
                shutil.rmtree(work / "out")
                print(f"pair {pair + 1}: {name}, workers={workers}: {found[0]:.1f} s, {size / 1e9:.2f} GB", end="; ")
                print(f"peak {found[1]:.2f} ({found[2]:.2f}) GiB; load of the machine {os.getloadavg()[0]:.1f}")
                sys.stdout.flush()
        cp = statistics.median(copied)
        print(f"\n{'':<14}{'workers':>8}{'seconds':>9}{'x cp':>7}{'peak GiB':>14}\n{'cp':<22}{cp:>9.1f}")
        for (name, workers), found in results.items():
            seconds = statistics.median(run[0] for run in found)
            peaks = f"{max(run[1] for run in found):.2f} ({max(run[2] for run in found):.2f})"
            whole = f"  {WHOLE} layers, extrapolated: {seconds * WHOLE / layers / 60:.0f} min" * (args.shape == "70b")
            print(f"{name:<14}{workers:>8}{seconds:>9.1f}{seconds / cp:>7.2f}{peaks:>14}{whole}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
