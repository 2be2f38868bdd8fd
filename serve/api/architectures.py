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

# reason -> source architectures that `loopwise convert` supports and no engine serves.
NOT_SERVED_BY_REASON = {
    "its layers keep a state, and the engines keep keys and values alone": """
        bamba falcon_h1 granitemoehybrid inkling_text jamba kimi_linear lfm2 lfm2_moe nemotron_h olmo_hybrid
        qwen3_5_moe_text qwen3_5_text qwen3_next""",
    "its attention keeps latents (MLA), and the engines keep keys and values alone": """
        axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite minicpm3 youtu""",
    "its layers have experts, which the engines have not been compared on": """
        afmoe aria_text cohere2_moe dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe gpt_oss granitemoe granitemoe_swa
        granitemoeshared hunyuan_v1_moe hy_v3 jetmoe laguna llama4_text mellum mimo_v2_flash minimax_m2
        minimax_m3_vl_text mixtral olmoe phimoe qwen2_moe qwen3_moe solar_open""",
    "no class of vLLM has been compared with it": """
        apertus biogpt bitnet bloom codegen cohere cohere2 cohere_compass_text ctrl cwm doge exaone4 falcon gemma4_text
        gemma4_unified_text gpt2 gpt_bigcode gpt_neo gpt_neox_japanese gptj granite_swa helium hunyuan_v1_dense
        hyperclovax jais2 ministral3 modernbert-decoder mpt nanochat olmo3 opt persimmon stablelm vaultgemma xglm""",
}
NOT_SERVED = {name: reason for reason, names in NOT_SERVED_BY_REASON.items() for name in names.split()}


def vllm_architecture(model_type: str | None) -> str:
    """The name of vLLM's class for source architecture `model_type`. Raises UserError, naming the choices."""
    if model_type not in ARCHITECTURES:
        why = f" ({NOT_SERVED[model_type]}; transformers runs it)" if model_type in NOT_SERVED else ""
        raise UserError(
            f"source architecture {model_type!r} cannot be served{why}: choose from {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]
