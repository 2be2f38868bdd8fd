"""Every field of vLLM's requests in two groups: an allow list, for fields of later releases too.

`SAMPLING` and `REFUSED_SAMPLING` are fields of `SamplingParams`; `BODY` and `REFUSED_BODY` are fields of HTTP bodies. A
field in no group is refused where it is set, until somebody tries it and adds it here. Tests walk them. Imports nothing
heavy.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from ..api.echo import brief, cut
from ..api.fields import UNREAD, XARGS, FieldError
from .arguments import names

SAMPLING = names("""
    n temperature top_p top_k min_p seed presence_penalty frequency_penalty repetition_penalty
    max_tokens min_tokens stop stop_token_ids ignore_eos include_stop_str_in_output repetition_detection
    logit_bias allowed_token_ids bad_words structured_outputs extra_args
    logprobs prompt_logprobs logprob_token_ids flat_logprobs
    detokenize skip_special_tokens spaces_between_special_tokens output_kind stream_interval output_text_buffer_length
    skip_clone skip_reading_prefix_cache
    _eos_token_id _all_stop_token_ids _bad_words_token_ids _watermarking_skipped
""")
BODY = names("""
    model prompt messages input instructions system suffix documents
    n temperature top_p top_k min_p seed presence_penalty frequency_penalty repetition_penalty
    max_tokens max_completion_tokens max_output_tokens min_tokens stop stop_sequences stop_token_ids ignore_eos
    include_stop_str_in_output repetition_detection length_penalty use_beam_search
    logit_bias allowed_token_ids bad_words structured_outputs response_format output_config text vllm_xargs
    logprobs top_logprobs prompt_logprobs logprob_token_ids echo
    stream stream_options stream_interval skip_special_tokens spaces_between_special_tokens
    return_tokens_as_token_ids return_token_ids return_token_offsets return_prompt_text
    truncate_prompt_tokens truncation_side truncation add_special_tokens
    chat_template chat_template_kwargs add_generation_prompt continue_final_message
    tools tool_choice parallel_tool_calls max_tool_calls reasoning reasoning_effort include_reasoning thinking include
    user metadata request_id session_id priority cache_salt prompt_cache_key prompt_cache_options
    prompt_cache_retention safety_identifier service_tier
    background store previous_response_id previous_input_messages enable_response_messages
""")

# name -> (values that turn the field off, why no others work); None turns every field off.
CONNECTOR = "no connector moves the keys and values of every depth"
TEXT = "this model reads text only"
REFUSED_SAMPLING: dict[str, tuple[tuple, str]] = {
    "watermarking": ((False,), "no watermark is made by this server"),
    "thinking_token_budget": ((), "a budget of thoughts is counted once a step, which may give several tokens"),
    "routed_experts_prompt_start": ((0,), "this model has no experts"),
    "trace_decode_token_ids": ((), "tokens are sampled; depths can be replayed, by `trace`"),
    "prompt_logprob_token_ids": ((), "prompt_logprobs gives the likeliest tokens alone"),
    "prompt_logprob_start": ((0,), "prompt_logprobs starts with the prompt"),
}
REFUSED_BODY: dict[str, tuple[tuple, str]] = {
    **{n: REFUSED_SAMPLING[n] for n in ("watermarking", "thinking_token_budget", "routed_experts_prompt_start")},
    "prompt_embeds": (([],), "a prompt is text, or token ids"),
    "kv_transfer_params": ((), CONNECTOR),
    "ec_transfer_params": ((), CONNECTOR),
    "return_weight_versions": ((False,), "weights are loaded once, whole"),
    "mm_payload": ((), TEXT),
    "return_mm_kwargs": ((False,), TEXT),
    "media_io_kwargs": (({},), TEXT),
    "mm_processor_kwargs": (({},), TEXT),
}
# Fields of a body that vLLM's beam search ignores: the values that turn them off.
UNREAD_BY_BEAMS: dict[str, tuple] = {
    "stop": ([], ""), "stop_token_ids": ([],), "logit_bias": ({},), "allowed_token_ids": ([],), "bad_words": ([],),
    "min_tokens": (0,), "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "seed": (),
    "repetition_penalty": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_detection": (),
    "structured_outputs": (), "response_format": ({"type": "text"},),
}  # fmt: skip
SMALLEST, LARGEST = -(2**63), 2**64 - 1  # integers that a message between vLLM's processes can hold
DEEPEST = 100  # objects and lists in one another: parsers, printers and templates call themselves for each
MOST_FIELDS = 256  # of a body; vLLM reads about 100
MOST_STOPS = 64  # strings: vLLM searches all of them at every token of a choice
OBJECTS = ("structured_outputs",)  # vLLM reads their keys before it checks that they are objects
UNKNOWN = "it is not known to work with Loopwise yet"


def check_fields(body: dict[str, Any]) -> None:
    """Raises FieldError for too many fields, and for values at which vLLM fails with status 500, on any route."""
    for where in ("", XARGS, *UNREAD):
        place = body.get(where) if where else body
        if isinstance(place, dict) and len(place) > MOST_FIELDS:
            raise FieldError(where, f"{where or 'the body'} has {len(place)} fields: at most {MOST_FIELDS}")
    for name, value in body.items():
        check_holdable(name, value)
        if name in OBJECTS and value is not None and not isinstance(value, dict):
            raise FieldError(name, f"{name}={brief(value, 60)}: an object")
        if name == "tools" and isinstance(choice := body.get("tool_choice"), dict) and "function" in choice:
            _check_named(value)


def validate_body(body: dict[str, Any], known: Iterable[str]) -> None:
    """Raises FieldError for a field of `body` that is refused, or by `check_fields`. `known`: the fields that vLLM
    reads."""
    check_fields(body)
    for name, value in body.items():
        if name in REFUSED_BODY:
            _refuse(name, value, *REFUSED_BODY[name])
        elif name not in BODY and name in known:
            _refuse(name, value, (), UNKNOWN)


def _check_named(tools: Any) -> None:
    """Raises FieldError for one of `tools` that is no function with a name: vLLM searches them for the chosen one."""
    for tool in tools if isinstance(tools, list) else ():
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            raise FieldError("tools", f"tools: {brief(tool, 60)} is no function with a name, and tool_choice names one")


def check_holdable(name: str, value: Any) -> None:
    """Raises FieldError for an integer of more than 64 bits, half a surrogate, or values nested too deeply, anywhere in
    the field `name`. Walks level by level: the longest lists, of a prompt's tokens, cost no step of Python an entry."""
    level, depth = [name, value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise FieldError(name, f"{cut(name)} is nested too deeply: at most {DEEPEST} levels")
        kinds = set(map(type, level))
        if int in kinds:
            numbers = [part for part in level if type(part) is int] if len(kinds) > 1 else level
            if not SMALLEST <= min(numbers) <= max(numbers) <= LARGEST:
                wrong = next(part for part in numbers if not SMALLEST <= part <= LARGEST)
                short = f"{wrong:.3g}" if abs(wrong) < 10**300 else brief(wrong, 24)
                raise FieldError(name, f"{short} in {cut(name)}: a whole number of at most 64 bits")
        if str in kinds:
            _check_text(name, [part for part in level if isinstance(part, str)])
        if kinds <= {int, float, str, bool, type(None)}:
            return
        level = list(chain.from_iterable(_inner(part) for part in level if isinstance(part, dict | list)))


def _inner(part: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return part if isinstance(part, list) else chain(part, part.values())


def _check_text(name: str, texts: list[str]) -> None:
    """Raises FieldError for half a surrogate in one of `texts`, of the field `name`."""
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise FieldError(name, f"{cut(name)} is not text: half a surrogate at {error.start}") from None


def validate_beam_search(body: dict[str, Any], depth: Iterable[str]) -> None:
    """Raises FieldError for a field of a `body` with use_beam_search that beam search ignores, and for one of `depth`,
    the depth fields in it."""
    if not body.get("use_beam_search"):
        return
    for name in depth:
        raise FieldError(name, f"{name} cannot be given with use_beam_search, whose requests carry no fields")
    for name, nothing in UNREAD_BY_BEAMS.items():
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or value not in nothing):
            raise FieldError(name, f"{name}={brief(value, 60)}: cannot be given with use_beam_search, which ignores it")


def validate_sampling(params: Any, default: Any) -> None:
    """Raises FieldError for a refused field of vLLM's sampling `params`, and for too many stop strings. `default`:
    params with all defaults."""
    for name in type(default).__struct_fields__:
        if name not in SAMPLING and (value := getattr(params, name, None)) != getattr(default, name):
            _refuse(name, value, *REFUSED_SAMPLING.get(name, ((), UNKNOWN)))
    if (count := len(params.stop or ())) > MOST_STOPS:
        raise FieldError("stop", f"stop has {count} strings: at most {MOST_STOPS}")
    for name in ("kv_transfer_params", "ec_transfer_params"):
        _refuse(name, (getattr(params, "extra_args", None) or {}).get(name), (), CONNECTOR)


def validate_tokens(named: dict[str, Iterable[int] | None], count: int) -> None:
    """Raises FieldError for a token id in `named`, ids by field, beyond a vocabulary of `count` tokens.

    Such a token has no embedding, and no probability.
    """
    for name, tokens in named.items():
        for token in tokens or ():
            if not 0 <= token < count:
                raise FieldError(
                    name, f"token id {token} in {name}: this model has 0 to {count - 1}, a vocabulary of {count} tokens"
                )


def tokens_of(params: Any) -> dict[str, Iterable[int] | None]:
    """The token ids in vLLM's sampling `params`, by field."""
    fields = ("stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids")
    words = getattr(params, "_bad_words_token_ids", None) or ()
    return {
        "bad_words": [token for word in words for token in word],
        **{name: getattr(params, name, None) for name in fields},
    }


def _refuse(name: str, value: Any, accepted: tuple, why: str) -> None:
    if value is not None and not any(type(value) is type(one) and value == one for one in accepted):
        raise FieldError(name, f"{name}={brief(value, 60)}: {why}")
