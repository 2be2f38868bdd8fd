"""Tiny random recurrent-depth checkpoints with a tokenizer, and what transformers generates from them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM

Case = TypeVar("Case")
VOCABULARY = 259  # bytes and three special tokens
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
RETROFIT = {"prelude": [0, 1], "core": [4, 3], "coda": [5], "injection": "linear"}
RECURSIVE = {"prelude": [], "core": [0, 2, 5], "coda": []}


SANDWICH = {**GROUPED, "initializer_range": 0.1}  # norms after every sublayer amplify differences of rounding
HUGINN = {**SANDWICH, "norm_after_residual": True, "qk_bias": True, "embedding_scale": 8.0, "tie_word_embeddings": True}
# Arguments of vLLM's that are passed on and no other case has.
SCHEDULING = {
    "scheduling_policy": "priority", "long_prefill_token_threshold": 16, "scheduler_reserve_full_isl": False,
    "prefix_caching_hash_algo": "sha256_cbor", "stream_interval": 2, "distributed_executor_backend": "uni",
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    "max_num_active_seqs": 3, "long_prefill_token_threshold_adaptive": True, "max_num_queued_reqs": 500,
    "max_num_queued_tokens": 50_000,
}  # fmt: skip
LORA = {"self_attn.q_proj": 4, "self_attn.v_proj": 3, "self_attn.o_proj": 5, "mlp.up_proj": 6, "mlp.down_proj": 2}
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
OWN = {"depths": 3, "rank": LORA, "own": NORMS, "dora": False}
RELAXED = {**RETROFIT, "relaxation": OWN}
BIASES = ["self_attn.q_proj.bias", "self_attn.v_proj.bias"]
BIASED = {**RETROFIT, "relaxation": {"depths": 2, "rank": LORA, "own": NORMS + BIASES, "dora": True}}
WIDE = {"hidden_size": 128, "num_key_value_heads": 2}  # for architectures without a head_dim of their own
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.2, "logits_scaling": 2.0}
# Fields of the source, by architecture. Those of REQUIRED are served in several shapes.
REQUIRED = {
    "llama": GROUPED,
    "qwen3": {**GROUPED, "tie_word_embeddings": True},
    "mistral": {**GROUPED, "sliding_window": 8},
    "gemma3_text": {**GROUPED, **MIXED, "query_pre_attn_scalar": 48},
}
OTHERS = {
    "arcee": WIDE,
    "ernie4_5": GROUPED,
    "gemma": GROUPED,
    "gemma2": {**GROUPED, **MIXED, "query_pre_attn_scalar": 48},
    "glm": GROUPED,
    "glm4": GROUPED,
    "gpt_neox": {"hidden_size": 128, "rotary_pct": 0.5},
    "granite": {**WIDE, **GRANITE},
    "ministral": {**GROUPED, **MIXED},
    "nemotron": WIDE,
    "olmo": WIDE,
    "olmo2": WIDE,
    "phi": {"hidden_size": 128, "intermediate_size": 4 * 128},  # as published
    "phi3": {**WIDE, "sliding_window": 8},
    "qwen2": WIDE,
    "seed_oss": GROUPED,
    "smollm3": {**WIDE, "no_rope_layers": [1, 0, 1, 1, 0, 1]},
    "starcoder2": {**WIDE, "sliding_window": 8},
    "ungated": {**GROUPED, "hidden_act": "relu2", "qk_norm": True, "value_embeddings": [False, True] * 3},
}
TWO_RANKS, ON_TWO_CORES = {"tensor_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def cases_run(request: Any, cases: dict[str, Case]) -> dict[str, Case]:
    """Those of `cases` that are tested now, by the parameter `name` of the tests in the file that asks."""
    own = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = {item.callspec.params.get("name") for item in own}
    return {name: case for name, case in cases.items() if name in names}


def run_cases(work: list[dict], folder: Path, program: str) -> list[dict]:
    """The results of a `program` of this folder that runs an engine for each case of `work`."""
    (folder / "cases.json").write_text(json.dumps(work))
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    settings |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, Path(__file__).with_name(program), folder / "cases.json", folder / "results.json"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "results.json").read_text())


def source_config(model_type: str, **fields):
    return AutoConfig.for_model(model_type, **{**SMALL, **fields})


def save(folder: Path, source, seed: int = 0, **fields) -> RecurrentDepthForCausalLM:
    """Write a random model to `folder` and return it. All weights are random: injection, norms and biases too."""
    torch.manual_seed(seed)
    model = RecurrentDepthForCausalLM(RecurrentDepthConfig(source_config=source, **fields)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "injection.weight" or "lora_" in name:  # as yet uninitialised memory
                parameter.normal_(std=0.15)
            elif name.startswith("router."):  # depths vary
                parameter.normal_(std=0.3)
            elif name == "damping.weight":
                parameter.normal_()
            elif "dora_" in name:
                parameter.uniform_(1.5, 2.5)
            elif name.startswith("time_conditioning."):
                parameter.normal_(std=0.1)
            elif name.startswith("relaxation.") or parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if getattr(source, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # transformers' SDPA leaves the cap out
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def change_config(folder: Path, **fields) -> None:
    """Replace fields of a checkpoint's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, **special)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def prompts(count: int = 8, seed: int = 1) -> list[list[int]]:
    """Token lists of mixed length: 1 token, a few, and longer than a 32-token block or an 8-token window."""
    lengths = [1, 3, 9, 17, 33, 40, 70, 97]
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(lengths[i % len(lengths)])] for i in range(count)]


@dataclass
class Answer:
    """A greedy continuation, its log-probabilities, and the smallest gap between the two largest logits on the way."""

    tokens: list[int]
    logprobs: list[float]
    gap: float


@torch.no_grad()
def generate(model, prompt: list[int], num_recurrences: int, count: int) -> Answer:
    """transformers' continuation of `prompt`, `count` tokens long."""
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        num_recurrences=num_recurrences,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, 1)[0]
    top = logits.topk(2).values
    logprobs = logits.log_softmax(-1).max(-1).values.tolist()
    return Answer(out.sequences[0, len(prompt) :].tolist(), logprobs, (top[:, 0] - top[:, 1]).min().item())
