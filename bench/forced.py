"""Requests of forced depths for `bench.serve`: the model, the jobs, the FLOP bounds and the table."""

from __future__ import annotations

import random
import statistics
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .figures import add

DEPTHS, VOCABULARY, OUTPUT, MEAN = 8, 8192, 64, 3.0


@dataclass
class Job:
    """One request: its prompt, and the depth of every position."""

    prompt: list[int]
    trace: list[int]

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a request that ask for these depths; those at full depth as users do."""
        return {"num_recurrences": DEPTHS} if {*self.trace} == {DEPTHS} else {"trace": self.trace}


@dataclass
class Bound:
    """Multiply-adds of a position: `once` in the head, `core` in a recurrence."""

    once: int
    core: int

    def work(self, depths: list[int], reads: int) -> int:
        return sum(depths) * self.core + reads * self.once


def make(folder: Path, lora: int = 0, router: dict[str, Any] | None = None) -> Bound:
    """Write the model, with a tokenizer, to `folder`. With a router, it has as many recurrences as thresholds."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM

    torch.manual_seed(0)
    source = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=2688, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    relaxation = {"depths": DEPTHS, "rank": dict.fromkeys(names, lora), "own": [], "dora": False} if lora else None
    depths = len(router["thresholds"]) if router else DEPTHS
    config = RecurrentDepthConfig(
        source_config=source, core=[0, 1, 2, 3], num_recurrences=depths, relaxation=relaxation, router=router
    )
    model = RecurrentDepthForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.startswith("router."):
            torch.nn.init.normal_(parameter, std=0.01 if "lora_" in name else 0.3)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:150]
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train([str(text) for text in texts], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    head = model.get_output_embeddings().weight.numel()
    return Bound(head, sum(p.numel() for p in model.core.parameters()))


def jobs(draw: random.Random, count: int, system: str) -> list[Job]:
    weights = geometric(MEAN)
    made = []
    for _ in range(count):
        prompt = draw.choices(range(3, 8000), k=draw.randint(16, 48))
        drawn = draw.choices(range(1, DEPTHS + 1), weights, k=len(prompt) + OUTPUT)
        if system in ("fixed", "full"):
            drawn = [DEPTHS] * len(drawn)
        elif system != "prompts":
            drawn[: len(prompt) - 1] = [DEPTHS] * (len(prompt) - 1)
        made.append(Job(prompt, drawn))
    return made


def geometric(mean: float) -> list[float]:
    """Weights of depths 1 .. DEPTHS, proportional to q^k, with this mean."""
    low, high = 1e-6, 1e3
    for _ in range(200):
        q = (low * high) ** 0.5
        weights = [q**k for k in range(1, DEPTHS + 1)]
        now = sum(k * w for k, w in enumerate(weights, 1)) / sum(weights)
        low, high = (q, high) if now < mean else (low, q)
    return weights


def share(bound: Bound, done: list[Job]) -> tuple[float, float]:
    """The FLOP bounds: how much less than at full depth was asked for, end to end and in decoding alone. The last
    token of a request is never run."""
    runs = [job.trace[:-1] for job in done]
    decoding = [job.trace[len(job.prompt) - 1 : -1] for job in done]

    def of(traces: list[list[int]]) -> float:
        full = sum(bound.work([DEPTHS] * len(trace), OUTPUT) for trace in traces)
        return full / sum(bound.work(trace, OUTPUT) for trace in traces)

    return of(runs), of(decoding)


def report(rates: dict[str, list[float]], bounds: dict[str, tuple[float, float]]) -> None:
    print(f"\n{'':<10}{'tok/s':>8}{'x fixed':>9}{'spread':>14}{'bound':>8}{'share':>8}{'other bound':>14}")
    for system, rate in rates.items():
        ratios = [mine / base for mine, base in zip(rate, rates["fixed"], strict=True)]
        ratio, (bound, decode) = statistics.median(ratios), bounds[system]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(
            f"{system:<10}{statistics.median(rate):>8.0f}{ratio:>9.2f}{spread:>14}{bound:>8.2f}{ratio / bound:>8.1%}"
            f"{decode:>14.2f}"
        )
        add(f"{system} against fixed", ratio, "x", spread=spread, bound=round(bound, 3))
    if "lora" in rates:
        slower = statistics.median(b / a for a, b in zip(rates["lora"], rates["exits"], strict=True)) - 1
        print(f"LoRA costs {slower:.1%}")
