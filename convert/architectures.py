"""Source architectures of transformers in lists: supported (some inside of another), not yet, and never.

The tests prove that converted models of the supported ones equal their sources, and that every causal or multimodal
language model of the installed transformers is in one list.
"""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from ..errors import UserError
from ..model.source_layers import layer_list_name
from ..unroll import per_layer

SUPPORTED = """
afmoe apertus arcee aria_text axk1 axk2 bamba biogpt bitnet bloom codegen cohere cohere2 cohere2_moe cohere_compass_text
ctrl cwm deepseek_v2 deepseek_v3 deepseek_v32 doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1
flex_olmo gemma gemma2 gemma3_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode
gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax inkling_text jais2 jamba jetmoe kimi_linear
laguna lfm2 lfm2_moe llama llama4_text mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3
mistral mixtral modernbert-decoder mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi
phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 solar_open
stablelm starcoder2 vaultgemma xglm youtu
""".split()  # noqa: SIM905 (a table)

# Multimodal ones whose text model stands inside and is supported: it is taken out. (Where config.json chooses the text
# model, that of the type's default is.)
MULTIMODAL = """
aria aya_vision blip-2 cohere2_vision cohere_compass cosmos3_omni deepseek_vl deepseek_vl_hybrid exaone4_5 fast_vlm
fun_asr_nano fuyu gemma3 gemma4 gemma4_unified glmasr got_ocr2 granite_speech granite_speech_plus hyperclovax_vision_v2
idefics2 idefics3 inkling_mm_model instructblip instructblipvideo internvl janus kimi_k25 lfm2_vl lighton_ocr llama4
llava llava_next llava_next_video llava_onevision minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral3 nemotron_h_omni ovis2
perception_lm pp_chart2table qianfan_ocr qwen2_5_omni qwen2_5_omni_thinker qwen2_5_vl qwen2_audio qwen2_vl qwen3_5
qwen3_5_moe qwen3_asr qwen3_omni_moe qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe shieldgemma2 smolvlm vibevoice_asr
video_llama_3 video_llava vipllava voxtral
""".split()  # noqa: SIM905 (a table)

# reason -> architectures. Each reason completes "architecture 'x' is not supported yet: ".
NOT_YET_BY_REASON = {
    "its text model has no causal class of its own; a plain type that computes the same would do it": """
        chameleon cosmos3_edge deepseek_ocr2 emu3 glm46v glm4v glm4v_moe glm_ocr glmga granite4_vision hunyuan_vl
        kosmos-2 kosmos-2.5 muse_glimmer paddleocr_vl step3p7""",
    "transformers' AutoModelForCausalLM has no class for it; an entry there would do it": "mistral4",
    "its layers hold parts for images and sound beside the text's; leaving these out would do it": """
        ernie4_5_vl_moe phi4_multimodal""",
    "several streams of hidden states run between its layers (hyper-connections, AltUp), and the recurrence has one; "
    "injection, norms and initial states of all streams would do it": """
        deepseek_v4 gemma3n gemma3n_text glm5_next hy_v4 qwen4_exp qwen4_exp_text""",
    "a layer hands the keys that it chose, or its router's state, on to the next; a state of that beside the hidden "
    "states would do it": "glm_moe_dsa zaya",
    "each of its layers has two attentions, with a cache slot for each, and a slot here is a layer's; two slots for a "
    "layer would do it": "longcat_flash",
    "its own stacks recur already, in another order than prelude, core and coda; an import of its checkpoints would do "
    "it": "hrm_text",
    "all its layers keep a state alone, and its cache counts no positions; a count beside the states would do it": """
        falcon_mamba mamba mamba2""",
    "it keeps states in a cache of its own kind, or in its layers, not in transformers' slots; a slot for its states "
    "would do it": "recurrent_gemma reformer rwkv xlstm",
    "several of its layers share one transformer block, tied by their numbers; tying them by a map would do it": """
        zamba zamba2""",
    "transformers cannot read a config.json that it wrote for it; a mend there would do it": "dbrx",
    "its own decoding with a cache fails in transformers; a mend there would do it": "cpmant",
    "it has no key-value cache in transformers; decoding without one, as the source does, would do it": "openai-gpt",
}
CANNOT_BY_REASON = {
    "its attention depends on a layer's place, which a layer that recurs does not have": "diffllama minimax",
    "it is a masked language model whose decoder reads both ways unless it is told otherwise": """
        bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
        roberta-prelayernorm roc_bert roformer xlm xlm-roberta
        xlm-roberta-xl xlnet xmod""",
    "it is an encoder-decoder, or the decoder of one": """
        bart bigbird_pegasus blenderbot blenderbot-small florence2 marian mbart mvp pegasus pix2struct plbart
        pp_formulanet prophetnet t5gemma2 trocr udop vision-encoder-decoder whisper""",
    "its decoder reads an image, sound or a protein within its layers, or writes sound": """
        blip evolla git idefics kyutai_speech_to_text mllama moshi musicgen musicgen_melody voxtral_realtime""",
    "tokens of its prompt, or of the block of text that it makes, attend to later ones": "diffusion_gemma paligemma",
    "it writes the motions of a robot": "pi0",
    "it drafts for another model, whose keys and values it reads": "gemma4_assistant gemma4_unified_assistant",
    "it reads bytes in patches, by three models in a row": "blt",
    "files of these models have model_type gpt2, which is supported": "gpt-sw3",
}
NOT_YET = {name: reason for reason, names in NOT_YET_BY_REASON.items() for name in names.split()}
CANNOT = {name: reason for reason, names in CANNOT_BY_REASON.items() for name in names.split()}

# Fields under which a supported architecture is another one: what they do, with {value} for the field's value.
REFUSED_FIELDS = {
    "scale_attn_by_inverse_layer_idx": "scales attention by a layer's place, which a layer that recurs does not have; "
    "train the model without it first",
    "num_kv_shared_layers": "lets the last {value} layers read keys and values of the layers before them, over a "
    "boundary that a recurrence would move",
    "hidden_size_per_layer_input": "gives each layer a part of every token's embedding, in one table for all layers, "
    "and the layers of an unrolled model are of another number",
}

# Fields of attention that reads both ways -> their values under which it is causal.
CAUSAL_VALUES: dict[str, tuple[object, ...]] = {
    "use_bidirectional_attention": (False, None, "vision"),  # Gemma 4's "vision": of images alone
    "is_causal": (True,),
}


def check_supported(model_type: str) -> None:
    """Raise UserError for an architecture that is not supported: the reason, or all that are for an unknown one."""
    if model_type in NOT_YET:
        raise UserError(f"architecture {model_type!r} is not supported yet: {NOT_YET[model_type]}")
    if model_type in CANNOT:
        raise UserError(f"architecture {model_type!r} cannot be converted: {CANNOT[model_type]}")
    if model_type not in SUPPORTED:
        raise UserError(f"architecture {model_type!r} is not supported; supported are {', '.join(SUPPORTED)}")


def check_fields(config: PreTrainedConfig, path: object) -> None:
    """Raise UserError for the config of a supported architecture, read from `path`, with a field that is not."""
    for name, effect in REFUSED_FIELDS.items():
        if value := getattr(config, name, None):
            raise UserError(f"{path}: {name}={value} {effect.format(value=value)}")
    for name, causal in CAUSAL_VALUES.items():
        if (value := getattr(config, name, causal[0])) not in causal:
            raise UserError(
                f"{path}: {name}={value} lets a token attend to later ones, and a recurrent-depth model makes text "
                f"token by token; only {name}={causal[0]} converts"
            )


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """A name for the kind of every layer of the source `model`; only layers of one kind are tied.

    The kind is the attention type, the entries of the config's per-layer lists, and the shapes of the parameters
    (mixtures of experts often begin with dense layers).
    """
    config = model.config
    layers = list(model.get_submodule(layer_list_name(model, config.num_hidden_layers)).children())
    structures = [{(name, tensor.shape) for name, tensor in layer.state_dict().items()} for layer in layers]
    lists, kinds = per_layer(config), list[str]()
    for i, attention in enumerate(get_layer_types_and_kwargs(config)[0]):
        more = [f"{name}={value[i]}" for name, value in lists.items() if value[i] != attention]
        if structures[i] != structures[0]:
            more.append(f"parameters as layer {structures.index(structures[i])}")
        kinds.append(" ".join([attention, *more]))
    return kinds
