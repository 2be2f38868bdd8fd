"""Bodies of requests that no client means to send: valid ones, changed at random places."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "tiny", "prompt": "abc", "max_tokens": 2, "logprobs": 1, "echo": True}),
    ("/v1/completions", {"model": "tiny", "prompt": [[1, 2], [3]], "n": 2, "stop": ["a"], "logit_bias": {"5": 1.0}}),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "decoder": "diffusion", "diffusion": {"inner": 1}}),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "exit_rule": "kl", "exit_threshold": 0.5, "trace": None}),
    (
        "/v1/completions",
        {"model": "tiny", "prompt": "a", "trace": [1, 2, 3], "vllm_xargs": {"return_recurrences": True}},
    ),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "structured_outputs": {"regex": "a+"}, "stream": True}),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "use_beam_search": True, "n": 2, "temperature": 0.0}),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "repetition_detection": {"min_count": 2}, "bad_words": ["b"]}),
    ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}, "num_recurrences": 2}),
    ("/v1/chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": "none", "chat_template_kwargs": {"a": 1}}),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {**CHAT, "structured_outputs": {"json": {"type": "object", "properties": {"a": {}}}}}),
    ("/v1/chat/completions/batch", {**CHAT, "messages": [CHAT["messages"]] * 2}),
    ("/v1/responses", {"model": "tiny", "input": "a", "max_output_tokens": 2, "store": False}),
    ("/v1/messages", {**CHAT, "system": "b", "stop_sequences": ["c"]}),
    ("/invocations", {"model": "tiny", "prompt": "abc", "max_tokens": 2}),
    ("/invocations", CHAT),
    ("/inference/v1/generate", {"model": "tiny", "token_ids": [1, 2], "sampling_params": {"max_tokens": 2}}),
    ("/generative_scoring", {"model": "tiny", "query": "a", "items": ["b"], "label_token_ids": [5, 6]}),
    ("/tokenize", {"model": "tiny", "prompt": "abc", "add_special_tokens": True}),
    ("/tokenize", {"model": "tiny", "messages": CHAT["messages"]}),
    ("/detokenize", {"model": "tiny", "tokens": [65, 66]}),
    ("/v1/messages/count_tokens", CHAT),
    ("/v1/chat/completions/render", CHAT),
    ("/v1/completions/render", {"model": "tiny", "prompt": "abc"}),
]


def nested(depth: int, kind: str = "[") -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "[" else {"a": value}
    return value


def odd(draw: random.Random) -> Any:
    """A value that a field hardly expects."""
    return draw.choice((
        None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400, 0.5, -0.0, 1e308, 1e999,
        float("nan"), "", "a", "\ud800", "\x00", "é" * 50, "x" * 5000, "[" * 3000, "(" * 200, "{{ a }}", "None", "1",
        [], [None], [[]], [1, "a"], [-1], ["x" * 300] * 40, [2**70], list(range(700)), {}, {"a": 1}, {"": None},
        {"type": "x"}, {"a" * 300: 1}, {f"k{n}": n for n in range(draw.choice((3, 70, 300)))},
        nested(draw.choice((5, 60, 99, 101, 300))), nested(draw.choice((5, 60, 101, 300)), "{"),
        json.dumps(nested(200)), {"type": "json_schema", "json_schema": {"name": "a", "schema": nested(90, "{")}},
        {"regex": "(" * 50}, {"json": "[" * 500}, {"grammar": "root ::= "}, {"choice": []}, {"structural_tag": "{"},
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}], [{"role": "x"}], [{"type": "function"}],
    ))  # fmt: skip


NAMES = (
    "model", "prompt", "messages", "input", "n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens",
    "min_tokens", "stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words", "structured_outputs",
    "response_format", "vllm_xargs", "logprobs", "top_logprobs", "prompt_logprobs", "logprob_token_ids", "echo",
    "stream", "stream_options", "truncate_prompt_tokens", "tools", "tool_choice", "chat_template",
    "chat_template_kwargs", "documents", "priority", "request_id", "cache_salt", "metadata", "user", "suffix",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "repetition_detection", "length_penalty",
    "use_beam_search", "reasoning_effort", "continue_final_message", "add_generation_prompt", "extra_body",
    "num_recurrences", "min_recurrences", "exit_rule", "exit_threshold", "prompt_exit", "trace", "decoder",
    "max_in_flight", "diffusion", "return_recurrences", "wave", "sampling_params", "token_ids", "tokens", "items",
    "query", "label_token_ids", "instructions", "previous_response_id", "background", "truncation", "text", "reasoning",
)  # fmt: skip


def change(draw: random.Random, value: Any) -> Any:
    """`value` with one change: here, or somewhere in it."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice([*value])
        return {**value, name: change(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.5:
        at = draw.randrange(len(value))
        return [*value[:at], change(draw, value[at]), *value[at + 1 :]]
    return odd(draw)


def case(number: int) -> tuple[str, bytes]:
    """The path and the body of case `number`."""
    draw = random.Random(number)
    chosen = draw.choice(VALID)
    path, body = chosen[0], copy.deepcopy(chosen[1])
    for _ in range(draw.choice((1, 1, 2, 3))):
        if not isinstance(body, dict):
            break
        if draw.random() < 0.6:
            body[draw.choice(NAMES)] = odd(draw)
        else:
            body = change(draw, body)
    text = json.dumps(body).encode()
    if draw.random() < 0.25:
        return path, damaged(draw, text)
    return path, text


def damaged(draw: random.Random, text: bytes) -> bytes:
    """`text` with bytes lost, doubled, changed or put in."""
    at = draw.randrange(len(text))
    to = min(len(text), at + draw.choice((1, 1, 5, 50)))
    strange = draw.choice((b"\xff", b"\x00", b"\\ud800", b"[" * 5000, b'{"a":' * 2000, b"9" * 5000, b"NaN"))
    return draw.choice((
        text[:at], text[:at] + text[to:], text[:to] + text[at:], text[:at] + draw.randbytes(to - at) + text[to:],
        text[:at] + strange + text[at:],
        text * 2, b"", b"[]", b"null", b'"a"', b"1" * 5000, b"[" * 10**5,
    ))  # fmt: skip
