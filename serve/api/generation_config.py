"""A checkpoint's generation_config.json, with one meaning in every engine: `generate`, `Engine` and the server.

Its fields are read as by vLLM (`--generation-config auto`), and `do_sample` as by transformers. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...checkpoint import read_json
from ...errors import UserError
from ...sampling import SETTINGS, check_setting, end_tokens

FILE = "generation_config.json"
# Fields that both engines apply. transformers has no presence_penalty and no frequency_penalty, vLLM has.
APPLIED = frozenset({*SETTINGS, "do_sample", "max_new_tokens", "eos_token_id"})
# Fields that do not change the text of a continuation: special tokens, the form of the result, the way of computing.
SILENT = frozenset({
    "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache",
    "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "prefill_chunk_size", "is_assistant",
    "low_memory", "max_time", "continuous_batching_config", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "assistant_early_exit",
    "assistant_ensemble_weight", "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type", "use_mtp",
    "remove_invalid_values", "trust_remote_code",
})  # fmt: skip
# Values of the others that change nothing: transformers' own defaults.
NEUTRAL: dict[str, tuple] = {
    "encoder_repetition_penalty": (1,), "length_penalty": (1,), "diversity_penalty": (0,),
    "num_beams": (1,), "num_beam_groups": (1,),
    "num_return_sequences": (1,), "max_length": (20,), "early_stopping": (False,), "typical_p": (1,),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,), "min_new_tokens": (0,), "renormalize_logits": (False,), "guidance_scale": (1,),
    "penalty_alpha": (0,), "token_healing": (False,),
}  # fmt: skip


def fields_of(folder: str | Path) -> dict[str, Any]:
    """The fields of generation_config.json in checkpoint directory `folder` that have a value; none without the file.

    Raises UserError, naming the file, for one that is no JSON object, and for values that are no numbers.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return {}
    fields = given(read_json(file))
    try:
        sampling_of(fields)
        stop_ids(fields)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return fields


def given(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` without those that are None, and without transformers' private ones."""
    return {name: value for name, value in fields.items() if value is not None and not name.startswith("_")}


def sampling_of(fields: dict[str, Any]) -> dict[str, Any]:
    """The sampling settings in `fields`, by a request's names: temperature, top_k, top_p, min_p, max_tokens, penalties.

    `do_sample=false` is temperature 0, as in transformers; `do_sample=true` without a temperature is temperature 1. A
    temperature without `do_sample` samples, as in vLLM. Raises UserError for values out of range.
    """
    found: dict[str, Any] = {}
    for name in SETTINGS:
        if (value := fields.get(name)) is not None:
            check_setting(name, value)
            found[name] = value
    if "top_k" in found:
        found["top_k"] = max(found["top_k"], 0)  # vLLM's -1: all
    if (value := fields.get("do_sample")) is not None and not isinstance(value, bool):
        raise UserError(f"do_sample={value!r}: true or false")
    if fields.get("do_sample") is False:
        found["temperature"] = 0.0
    elif fields.get("do_sample"):
        found.setdefault("temperature", 1.0)
    if fields.get("max_new_tokens") is not None:
        found["max_tokens"] = _integer("max_new_tokens", fields["max_new_tokens"])
    return found


def stop_ids(fields: dict[str, Any]) -> set[int]:
    """The tokens of `eos_token_id`, one or a list, without negative ones. Raises UserError for a non-integer."""
    return {token for token in end_tokens(fields.get("eos_token_id")) if token >= 0}


def unapplied(fields: dict[str, Any], applied: Iterable[str]) -> list[str]:
    """Those of `fields`, as "name=value", that would change a text, and that an engine ignores which has `applied`."""
    return [
        f"{name}={value!r}"
        for name, value in fields.items()
        if name not in applied and name not in SILENT and value not in NEUTRAL.get(name, ()) and value not in ([], {})
    ]


def warning(fields: dict[str, Any], applied: Iterable[str]) -> str | None:
    """A line that names the fields that an engine with the `applied` names ignores; None where it applies all."""
    if not (ignored := unapplied(fields, applied)):
        return None
    return f"warning: {FILE} has {', '.join(ignored)}, which this engine ignores"


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={value!r}: an integer above 0")
    return value
