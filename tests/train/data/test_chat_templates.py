"""Conversations through chat templates: the learned tokens, and malformed conversations."""

from __future__ import annotations

import random
import time

import pytest

from loopwise.errors import UserError
from loopwise.train.data import build, chat
from loopwise.train.data.documents import documents
from loopwise.train.data.reader import Reader
from loopwise.train.recipe import Data

CHAT = [
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "because"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "so"},
]
TEMPLATES = {
    "plain": "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "marked": "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}|{% endgeneration %}{% else %}{{ m['content'] }}|{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_are_learned_where_the_assistant_speaks(template, tokenizer, tmp_path):
    import copy
    import json

    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = TEMPLATES[template]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n")
    data = Data(train=[str(file)], chat_field="messages", sequence_length=8)
    text = "[user]why|[assistant]because|[user]and|[assistant]so|"
    blocks = build(data, chatting, tmp_path / "tokens").train
    row = blocks.rows(range(len(blocks)))
    ids, labels = row["input_ids"].ravel(), row["labels"].ravel()
    whole = [*chatting(text, add_special_tokens=False)["input_ids"], 0][: len(ids)]
    assert ids.tolist() == whole
    said = [chatting.decode([i]) for i in labels if i != -100]
    assert "".join(said) == "because|so|"[: len(said)]
    assert len(said) >= 8


@pytest.mark.parametrize("spaces", ["", " ", "\n", "  "])
def test_marked_tokens_are_those_of_transformers(spaces, tokenizer):
    import copy

    from loopwise.train.data.chat import Conversation, encode

    chatting = copy.deepcopy(tokenizer)
    template = TEMPLATES["marked"].replace("{% generation %}", spaces + "{% generation %}" + spaces)
    chatting.chat_template = template.replace("|{% endgeneration %}", spaces + "{% endgeneration %}" + spaces)
    theirs = chatting.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ours = encode(Conversation(CHAT), chatting, "here")
    assert ours.ids == theirs["input_ids"]
    expected = [bool(one) for one in theirs["assistant_masks"]]
    assert ours.assistant_mask[: len(expected) - 1] == expected[:-1]
    assert 0 < sum(expected) < len(expected)


@pytest.mark.parametrize("kind", ["marked", "plain"])
def test_spans_of_any_kind_are_those_of_the_naive_rule(kind, tokenizer):
    """Among them empty ones, overlapping ones, and those that begin or end inside of a character of several tokens."""
    text = "añ→𝛼 b ⚠ c" * 8
    draw = random.Random(0)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for _ in range(200):
        ends = [sorted(draw.choices(range(1, len(text) + 1), k=2)) for _ in range(draw.randrange(4))]
        spans = [(a, b) for a, b in ends if a < len(text)]
        naive = [any(a <= start < b for a, b in spans) for start, _ in encoded["offset_mapping"]]
        if kind == "marked":  # as transformers does it
            naive = [False] * len(naive)
            for a, b in spans:
                first, last = encoded.char_to_token(0, a), encoded.char_to_token(0, b - 1)
                naive[first : last + 1] = [True] * (last + 1 - first)
        ids, mask = (chat._with_marks if kind == "marked" else chat._with_prefixes)(text, spans, tokenizer)
        assert ids == encoded["input_ids"]
        assert mask == naive


@pytest.mark.parametrize("kind", ["marked", "plain"])
def test_the_time_of_many_answers_grows_with_the_text(kind, tokenizer):
    """100,000 tokens and 25,000 answers: their product would take minutes."""
    text = "abcd" * 25_000
    spans = [(place, place + 2) for place in range(0, len(text), 4)]
    start = time.monotonic()
    _, mask = (chat._with_marks if kind == "marked" else chat._with_prefixes)(text, spans, tokenizer)
    assert time.monotonic() - start < 5
    assert mask == [True, True, False, False] * 25_000


def test_bad_chats(tokenizer, tmp_path):
    for value, message in {
        '"x"': "a conversation is a list of messages, not str",
        '[{"role": "user"}]': "message 0 lacks text in 'role' or 'content'",
        '[{"role": "user", "content": "x"}]': "no message of the assistant",
    }.items():
        (tmp_path / "chat.jsonl").write_text('{"m": ' + value + "}\n")
        with pytest.raises(UserError, match=f"chat.jsonl:1: field 'm': {message}"):
            list(documents([str(tmp_path / "chat.jsonl")], Reader("m", chat=True)))
