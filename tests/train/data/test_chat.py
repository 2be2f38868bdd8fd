"""Conversations that a template refuses, tools and other template arguments, and the token that ends a turn."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from loopwise.cli import main
from loopwise.errors import UserError
from loopwise.train.data import build
from loopwise.train.data.documents import documents
from loopwise.train.data.reader import Reader
from loopwise.train.data.stream import Stream
from loopwise.train.recipe import Data
from tests.helpers.train_tiny import run

GOOD = [{"role": "user", "content": "why " * 9}, {"role": "assistant", "content": "because " * 9}]
ASKED = "{% if add_generation_prompt %}[assistant]{% endif %}"
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}" + ASKED
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '[' + m['role'] + ']' + m['content'] + '|' }}{% endfor %}" + ASKED
)
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]


@pytest.fixture
def chatting(tokenizer):
    """A copy of the tokenizer with a template: `chatting(template)`."""

    def with_template(template: Any) -> Any:
        made = copy.deepcopy(tokenizer)
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        made.chat_template = template
        return made

    return with_template


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def learned(file: Path, tokenizer: Any, folder: Path) -> tuple[str, str, bool]:
    """(text of the blocks, its learned part, True if an EOS is learned)."""
    blocks = build(Data(train=[str(file)], chat_field="messages", sequence_length=2), tokenizer, folder).train
    rows = blocks.rows(range(len(blocks)))
    ids, labels = rows["input_ids"].ravel(), rows["labels"].ravel()
    kept = labels[labels != -100]
    return tokenizer.decode(ids.tolist()), tokenizer.decode(kept.tolist()), bool((kept == 0).any())


def skipped(file: Path, tokenizer: Any, capsys) -> tuple[int, list[str]]:
    """(number of documents read from `file`, lines that name the skipped ones)."""
    reader = Reader("messages", chat=True, skip=True, tokenizer=tokenizer)
    count = len(list(documents([str(file)], reader)))
    return count, capsys.readouterr().err.splitlines()


def test_a_conversation_that_the_template_refuses(recurrent, chatting, tmp_path, capsys):
    """CASES.md 10."""
    import shutil

    model = Path(shutil.copytree(recurrent, tmp_path / "model"))
    chatting(STRICT).save_pretrained(model)
    bad = {"messages": [{"role": "system", "content": "be kind"}, *GOOD]}
    file = write(tmp_path / "c10.jsonl", [*[{"messages": GOOD}] * 20, bad, *[{"messages": GOOD}] * 20])
    keys = [f"data.train={file}", "data.chat_field=messages", "data.sequence_length=16", "batch_size=2", "steps=1"]
    run(["train", str(model), str(tmp_path / "r10"), *keys, "data.bad_records=skip"])
    error = capsys.readouterr().err
    assert f"skipped {file}:21: the chat template refuses it (System role not supported)" in error
    assert "1 bad records were skipped" in error
    assert main(["train", str(model), str(tmp_path / "r10b"), *keys]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"loopwise: error: {file}:21: the chat template refuses it")
    assert len(error.splitlines()) == 1
    for streamed in ("data.bad_records=skip", "data.bad_records=stop"):
        code = main(["train", str(model), str(tmp_path / streamed), *keys, "data.streaming=true", streamed])
        assert code == (0 if streamed.endswith("skip") else 2)
        assert "c10.jsonl:21: the chat template refuses it (System role not supported)" in capsys.readouterr().err


ASSISTANT = {"role": "assistant", "content": "x"}
# Content of a record: the reason in the error.
BAD: dict[str, tuple[Any, str]] = {
    "null content": ([{"role": "user", "content": None}, ASSISTANT], "message 0 lacks text in 'role' or 'content'"),
    "null message": ([None, ASSISTANT], "message 0 lacks text"),
    "an image": ([{"role": "user", "content": [{"type": "image"}]}, ASSISTANT], "a part of its content is 'image'"),
    "a number": ([{"role": "user", "content": 3}, ASSISTANT], "message 0 lacks text"),
    "no roles": ([{"from": "human", "value": "x"}], "message 0 lacks text"),
    "half a surrogate": ([{"role": "user", "content": "\ud800"}, ASSISTANT], "the chat template refuses it"),
    "two of the user": ([GOOD[0], GOOD[0], ASSISTANT], "Conversation roles must alternate"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_conversations_are_named(kind, chatting, tmp_path, capsys):
    value, message = BAD[kind]
    file = write(tmp_path / "c.jsonl", [{"messages": GOOD}, {"messages": value}, {"messages": GOOD}])
    count, said = skipped(file, chatting(STRICT), capsys)
    assert count == 2
    assert len(said) == 1
    assert said[0].startswith(f"skipped {file}:2: ")
    assert message in said[0]
    with pytest.raises(UserError, match=r"c\.jsonl:2: "):
        list(documents([str(file)], Reader("messages", chat=True, tokenizer=chatting(STRICT))))


@pytest.mark.parametrize(
    "broken", ["{{ messages[0].content.nothing.at.all }}", "{{ 1 / 0 }}", "{{ [1][7] + 1 }}", "{% if %}"]
)
def test_any_error_of_a_template_is_named(broken, chatting, tmp_path):
    file = write(tmp_path / "c.jsonl", [{"messages": GOOD}])
    with pytest.raises(UserError, match=r"c\.jsonl:1: the chat template refuses it \(") as caught:
        list(documents([str(file)], Reader("messages", chat=True, tokenizer=chatting(broken))))
    assert "\n" not in str(caught.value)


def test_bad_lines_of_every_kind_are_skipped_and_named(chatting, tmp_path, capsys):
    good = json.dumps({"messages": GOOD}).encode()
    lines = {
        b'{"messages": ' + b"[" * 100_000: "JSON that nests too deeply",
        b'{"messages": ' + b"9" * 5000 + b"}": "not JSON (Exceeds the limit",
        '{"messages": "schön"}'.encode("latin-1"): "not UTF-8",
        b"[1, 2]": "a record is an object",
        b"null": "a record is an object",
        b'{"other": 1}': "no field 'messages'",
        b'{"messages": 3}': "a conversation is a list of messages, not int",
        b'{"messages": []}': "a conversation is a list of messages, not an empty one",
        b'{"messages": ': "not JSON",
    }
    file = tmp_path / "c.jsonl"
    file.write_bytes(b"\r\n".join([good, *lines, good, b""]))
    count, said = skipped(file, chatting(PLAIN), capsys)
    assert count == 2
    assert len(said) == len(lines)
    for number, (line, message) in enumerate(zip(said, lines.values(), strict=True), 2):
        assert line.startswith(f"skipped {file}:{number}: ")
        assert message in line


def test_tools_and_documents_reach_the_template(chatting, tmp_path):
    """CASES.md 12: the template gets the same arguments as in transformers, and none of them is learned."""
    template = (
        "{% if tools %}[tools]{{ tools | tojson }}|{% endif %}"
        "{% if documents %}[docs]{{ documents[0].text }}|{% endif %}"
        "{% if style %}[style]{{ style }}|{% endif %}" + PLAIN
    )
    tokenizer = chatting(template)
    messages = [{"role": "user", "content": "weather?"}, {"role": "assistant", "content": "sunny"}]
    extra = {"tools": TOOLS, "documents": [{"text": "a page"}], "chat_template_kwargs": {"style": "brief"}}
    wanted = tokenizer.apply_chat_template(
        messages, tools=TOOLS, documents=extra["documents"], style="brief", tokenize=False
    )
    as_json = {**extra, "tools": json.dumps(TOOLS)}
    for number, more in enumerate((extra, as_json)):
        file = write(tmp_path / f"c{number}.jsonl", [{"messages": messages, **more}] * 2)
        text, said, _ = learned(file, tokenizer, tmp_path / f"tokens{number}")
        assert wanted in text
        assert "get_weather" in text
        assert set(said.replace("<eos>", "").split("|")) == {"sunny", ""}
    for key, value, message in (
        ("tools", "{", "field 'tools' is not JSON"),
        ("tools", {"a": 1}, "field 'tools' is a list, not a dict"),
        ("chat_template_kwargs", {"tokenize": True}, "chat_template_kwargs names 'tokenize'"),
    ):
        file = write(tmp_path / "bad.jsonl", [{"messages": messages, key: value}])
        with pytest.raises(UserError, match=rf"bad\.jsonl:1: {message}"):
            list(documents([str(file)], Reader("messages", chat=True, tokenizer=tokenizer)))


def test_tables_give_what_json_gives(chatting, tmp_path):
    """Columns fill missing fields with null. Read whole or streamed, they give the same records as JSON."""
    import datasets

    template = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + PLAIN.replace(
        "{{ m.content }}", "{{ m.content }}{% if 'name' in m %}({{ m.name }}){% endif %}"
    )
    tokenizer = chatting(template)
    records = [
        {"messages": [{**GOOD[0], "name": "ann"}, GOOD[1]], "tools": TOOLS},
        {"messages": [GOOD[0], {"role": "assistant", "content": [{"type": "text", "text": "so"}]}]},
    ]
    flat = [{**r, "messages": [{**m} for m in r["messages"]]} for r in records]
    flat[1]["messages"][1]["content"] = "so"
    for record in flat:
        record["messages"] = [{"name": None, **message} for message in record["messages"]]
        record["tools"] = json.dumps(record.get("tools"))
    datasets.Dataset.from_list(flat).to_parquet(tmp_path / "c.parquet")
    write(tmp_path / "c.jsonl", records)

    def read(name: str) -> list[list[int]]:
        reader = Reader("messages", chat=True, tokenizer=tokenizer)
        return [document.ids for document in documents([str(tmp_path / name)], reader)]

    assert read("c.parquet") == read("c.jsonl")
    data = {"train": [str(tmp_path / "c.parquet")], "streaming": True, "chat_field": "messages", "sequence_length": 4}
    stream = Stream([str(tmp_path / "c.parquet")], Data.model_validate({**data, "window": 2}), tokenizer, 0, None)
    whole = sorted(t for ids in read("c.jsonl") for t in [*ids, 0])
    found = sorted(int(t) for t in stream.first_window().tokens.ravel())
    assert len(found) > len(whole) - 4
    assert not [t for t in set(found) if found.count(t) > whole.count(t)]


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPOKEN = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}GEN{{ m.content }}END{% endif %}{% endfor %}"
)
# template: what of the last turn is learned, EOS by name where it is.
ENDS = {
    "by nothing, as GLM": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "because<eos>",
    ),
    "by white space": (PLAIN.replace("|", "\n"), "because\n<eos>"),
    "by text that is no token": (PLAIN, "because|<eos>"),
    "by its own token, as ChatML": (CHATML, "because<|im_end|>\n"),
    "by the tokenizer's EOS": (PLAIN.replace("|", "{{ eos_token }}"), "because<eos>"),
    "by a token behind what is marked": (
        SPOKEN.replace("GEN", "{%- generation -%}").replace("END", "{%- endgeneration -%}<|im_end|>"),
        "because<|im_end|>",
    ),
    "marked in another spelling": (
        SPOKEN.replace("GEN", "{%generation%}").replace("END", "{%endgeneration%}"),
        "because<eos>",
    ),
}


@pytest.mark.parametrize("kind", ENDS)
def test_the_model_learns_to_stop(kind, chatting, tmp_path):
    """CASES.md 13: a stop token after the assistant's last message is a target, the template's own or EOS."""
    template, wanted = ENDS[kind]
    chat = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
    file = write(tmp_path / "c13.jsonl", [{"messages": chat}] * 4)
    _, said, _ = learned(file, chatting(template), tmp_path / "tokens")
    assert said == wanted * 4


def test_nothing_is_learned_behind_others(chatting, tmp_path):
    """After a last message of the user, no stop token is a target."""
    chat = [
        *[{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}],
        {"role": "user", "content": "?"},
    ]
    file = write(tmp_path / "c.jsonl", [{"messages": chat}] * 2)
    _, said, eos = learned(file, chatting(PLAIN), tmp_path / "tokens")
    assert said == "so|" * 2
    assert not eos


def test_a_template_that_marks_nothing_is_named(chatting, tmp_path):
    marks_users = SPOKEN.replace("'assistant'", "'user'").replace("GEN", "{% generation %}")
    template = marks_users.replace("END", "{% endgeneration %}")
    file = write(tmp_path / "c.jsonl", [{"messages": [{"role": "tool", "content": "x"}, ASSISTANT]}])
    with pytest.raises(UserError, match=r"c\.jsonl:1: the chat template marks no tokens of the assistant"):
        list(documents([str(file)], Reader("messages", chat=True, tokenizer=chatting(template))))


def test_named_templates_are_chosen_as_transformers_does(chatting, tmp_path):
    tokenizer = chatting({"default": PLAIN, "tool_use": "[with tools]" + PLAIN})
    file = write(tmp_path / "c.jsonl", [{"messages": GOOD, "tools": TOOLS}, {"messages": GOOD}])
    text, *_ = learned(file, tokenizer, tmp_path / "tokens")
    assert text.startswith("[with tools][user]")
    assert text.count("[with tools]") == 1
