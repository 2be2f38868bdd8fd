"""Conversations through chat templates: the learned tokens, and malformed conversations."""

from __future__ import annotations

import pytest

from loopwise.errors import UserError
from loopwise.train.data import build
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


def test_bad_chats(tokenizer, tmp_path):
    for value, message in {
        '"x"': "a conversation is a list of messages, not str",
        '[{"role": "user"}]': "message 0 lacks text in 'role' or 'content'",
        '[{"role": "user", "content": "x"}]': "no message of the assistant",
    }.items():
        (tmp_path / "chat.jsonl").write_text('{"m": ' + value + "}\n")
        with pytest.raises(UserError, match=f"chat.jsonl:1: field 'm': {message}"):
            list(documents([str(tmp_path / "chat.jsonl")], Reader("m", chat=True)))
