"""The engine core alone, on this machine: depth-wise batching against fixed depth.

    python bench/engine.py [--batch 16] [--mean 3] [--pairs 7] [--policy single,last-exited] [--lora 16] [--threads 2]

A Llama-shaped model of random weights in bfloat16 (d=1024, a core of 4 layers, 8,192 tokens) is asked for tokens whose
depths are forced: a truncated geometric of the given mean, of at most 8. All systems run the same requests, one after
the other in every pair; what is printed is the median ratio, its spread, and the share of the FLOP bound
(F0 + R Fr) / (F0 + E[d] Fr).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig

from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.serve import Engine, Params

DEPTHS, VOCABULARY = 8, 8192


def make(lora: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    source = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=2688, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    relaxation = {"depths": DEPTHS, "rank": dict.fromkeys(names, lora), "own": [], "dora": False} if lora else None
    config = RecurrentDepthConfig(
        source_config=source, core=[0, 1, 2, 3], num_recurrences=DEPTHS, max_recurrences=DEPTHS, relaxation=relaxation
    )
    return RecurrentDepthForCausalLM(config).eval().to(dtype)


def geometric(mean: float) -> torch.Tensor:
    """Weights of depths 1 .. DEPTHS, proportional to q^k, with this mean."""
    k = torch.arange(1, DEPTHS + 1, dtype=torch.float64)
    low, high = 1e-6, 1e3
    for _ in range(200):
        q = (low * high) ** 0.5
        low, high = (q, high) if float((q**k / (q**k).sum() * k).sum()) < mean else (low, q)
    return q**k / (q**k).sum()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--mean", type=float, default=3.0)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--policy", default="single,last-exited")
    parser.add_argument("--coda-wait", type=int, default=0)
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    weights = geometric(args.mean)
    prompts, forced, fixed = [], [], []
    for _ in range(args.requests):
        length, out = (int(torch.randint(a, b, (1,), generator=generator)) for a, b in ((16, 48), (24, 48)))
        prompts.append(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())
        depths = (torch.multinomial(weights, out, True, generator=generator) + 1).tolist()
        forced.append(Params(max_tokens=out, ignore_eos=True, trace=(*[DEPTHS] * length, *depths)))
        fixed.append(Params(max_tokens=out, ignore_eos=True))
    for policy in args.policy.split(","):
        model = make(args.lora, torch.bfloat16)
        options = {"rows": args.batch, "length": 128, "kv_policy": policy, "coda_wait": args.coda_wait}
        engine = Engine(model, **options)
        core = sum(p.numel() for p in model.core.parameters())
        head = model.get_output_embeddings().weight.numel()
        bound = (head + DEPTHS * core) / (head + args.mean * core)

        def decode(params: list[Params], engine: Engine = engine) -> float:
            """Seconds for decoding: the same prompts for one token are taken off."""
            seconds = []
            for some in (params, [Params(max_tokens=1, ignore_eos=True, trace=p.trace) for p in params]):
                began = time.perf_counter()
                engine.generate(prompts, some)
                seconds.append(time.perf_counter() - began)
            return seconds[0] - seconds[1]

        decode(forced[:8] + forced[8:])
        ratios = []
        for _ in range(args.pairs):
            ratios.append(decode(fixed) / decode(forced))
        print(
            f"{policy}: {statistics.median(ratios):.2f}x of fixed depth ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"bound {bound:.2f}, share {statistics.median(ratios) / bound:.1%}"
        )


if __name__ == "__main__":
    main()
