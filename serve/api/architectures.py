"""Source architectures that can be served, and the names of their classes in vLLM. Imports nothing heavy."""

from __future__ import annotations

from ...errors import UserError

# model_type of the source -> vLLM's class; two are ours (vllm/sandwich.py, vllm/ungated.py). test_serve_equal.py
# compares each with transformers.
ARCHITECTURES = {
    "arcee": "ArceeForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral": "MinistralForCausalLM",
    "mistral": "MistralForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "sandwich": "LoopwiseSandwichForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "ungated": "LoopwiseUngatedForCausalLM",
}


def vllm_architecture(model_type: str | None) -> str:
    """The name of vLLM's class for source architecture `model_type`. Raises UserError, naming the choices."""
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"source architecture {model_type!r} cannot be served: choose from {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]
