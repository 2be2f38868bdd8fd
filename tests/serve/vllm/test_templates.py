"""Chat templates of a server: rendered in a process of their own, as transformers renders them, and bounded."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loopwise.bounded import BYTES, SECONDS, limit_memory
from loopwise.serve.vllm import templates
from loopwise.serve.vllm.templates import Elsewhere, TemplateError, Templates
from tests.helpers.application import application
from tests.helpers.serve_tiny import CHAT_TEMPLATE, tokenizer

pytestmark = pytest.mark.xdist_group("vllm")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

TOOLS = """{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}
{%- if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endif %}</s>
{% endfor %}{% if add_generation_prompt %}<assistant>{{ bos_token }}{% endif %}{{ style }}"""
MARKED = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
CALL = {"function": {"name": "f", "arguments": {"a": [1, None, "é"]}}}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Why?  😀\n\r\0"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "user", "content": "So "},
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    """A template that is computed in this process fails here, and does not fill the machine's memory."""
    before = limit_memory(2**33)
    yield
    if before is not None:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def process() -> Iterator[Templates]:
    made = Templates()
    yield made
    made.end()


@pytest.fixture
def small(process) -> Iterator[Templates]:
    """Templates with a second, and a size of 256 MiB where its process is a new one."""
    process.seconds, process.size = 1, 2**28
    yield process
    process.seconds, process.size = SECONDS, BYTES


@pytest.mark.parametrize(
    "arguments",
    [
        {"chat_template": TOOLS, "tools": [TOOL], "add_generation_prompt": True, "style": ["\ud83d", {"a": None}]},
        {"chat_template": TOOLS, "continue_final_message": True},
        {"chat_template": TOOLS, "tools": [TOOL], "tokenize": True, "max_length": 3, "truncation": True},
        {"chat_template": MARKED, "padding": True},
        {},
    ],
)
def test_a_text_is_that_of_transformers(arguments, process):
    tokens = tokenizer()
    options = {"tokenize": False, "return_dict": False, **arguments}
    found = Elsewhere(tokens, process).apply_chat_template(CHAT, **options)
    if options["tokenize"]:  # of the text, which vLLM cuts later
        options = {name: value for name, value in options.items() if name not in ("max_length", "truncation")}
    assert found == tokens.apply_chat_template(CHAT, **options)
    assert found


@pytest.mark.parametrize(
    ("chat", "arguments", "text"),
    [
        (CHAT, {"chat_template": "{{ raise_exception('roles must alternate') }}"}, "roles must alternate"),
        (CHAT, {"chat_template": "{{ messages[9].content.x }}"}, "has no element 9"),
        (CHAT, {"chat_template": "{% for"}, "unexpected"),
        (CHAT, {"chat_template": "{{ messages.append(1) }}"}, "is unsafe"),
        (CHAT, {"chat_template": "(" * 5 + "{{ " + "(" * 5000 + " }}"}, "nested too deeply|unexpected|parentheses"),
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
        ([], {}, "a chat has one"),
    ],
)
def test_a_template_s_refusal_ends_nothing(chat, arguments, text, process):
    assert process.render(conversations=[CHAT], chat_template="a") == "a"
    before = process.process.pid
    with pytest.raises(TemplateError, match=text):
        Elsewhere(tokenizer(), process).apply_chat_template(chat, tokenize=False, **arguments)
    assert process.render(conversations=[CHAT], chat_template="b") == "b"
    assert process.process.pid == before


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "endless": (LOOP, "does not end within 1 s"),
    "constant": ("{{ 'x' * 40000000000 }}", "needs more than"),  # computed when it is compiled
    "value": ("{{ messages[0].role * 20000000000 }}", "needs more than"),
    "steps": (
        "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "needs more than",
    ),
    "width": ("{{ '%9999999999d' % 1 }}", "needs more than|too big"),
    "list": ("{% set n = namespace(x=[1]) %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", "needs"),
    "text": ("{% for a in range(90) %}{{ 'x' * 999999 }}{% endfor %}", "makes more than 64 MiB of text"),
    "number": ("{{ (messages | length + 7) ** (10 ** 9) }}", "does not end within 1 s"),  # Python gets no turn
}


NIGHTLY = ("value", "width", "list", "text", "number")  # the others are the kinds that training's tests have


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in NIGHTLY)) for name in BOMBS])
def test_a_template_that_loops_or_grows_is_ended(name, small, monkeypatch):
    monkeypatch.setattr(templates, "LATE", 1.0)
    assert small.render(conversations=[CHAT], chat_template="a") == "a"  # the process has started
    template, text = BOMBS[name]
    start, before = time.monotonic(), peak()
    with pytest.raises(TemplateError, match=text):
        small.render(conversations=[CHAT], chat_template=template)
    assert time.monotonic() - start < 5
    assert peak() - before < 2**26
    assert small.render(conversations=[CHAT], chat_template="b") == "b"


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
def test_memory_is_that_of_all_templates_together(small):
    """Constants of compiled templates stay in the process."""
    small.end()
    small.render(conversations=[CHAT], chat_template="a")
    small.seconds, before, ended = 10, addresses(small), 0
    for number in range(12):
        template = f"{{{{ 'x' * {5 * 10**7} }}}}{number}"
        try:
            small.render(conversations=[CHAT], chat_template=template)
            assert addresses(small) - before <= 2**28
        except TemplateError:
            ended += 1
    assert 1 <= ended <= 6


def addresses(made: Templates) -> int:
    """The most bytes of addresses that the process has had."""
    assert made.process is not None
    return int(re.findall(r"VmPeak:\s+(\d+) kB", Path(f"/proc/{made.process.pid}/status").read_text())[0]) * 1024


@needs_vllm
def test_variables_are_those_that_vllm_finds():
    from vllm.renderers.hf import _resolve_chat_template_kwargs

    for template in (TOOLS, MARKED, CHAT_TEMPLATE, "{% set a = b %}{{ a }}{% for c in d %}{{ c.e }}{% endfor %}"):
        assert _resolve_chat_template_kwargs(template) <= templates.variables(template)
    assert templates.variables("{% for") == frozenset()


def test_a_process_that_is_gone_is_started_again(small):
    assert small.render(conversations=[CHAT], chat_template="a") == "a"
    assert small.process is not None
    small.process.kill()
    small.process.join()
    assert small.render(conversations=[CHAT], chat_template="b") == "b"


CYCLE = "{% set a = messages %}{% set b = a %}{% set a = b %}"  # vLLM 0.32 looks for the form of messages for ever
WORD = "{% if messages[0].content == 'NAME' %}BOMB{% endif %}"


@needs_vllm
@pytest.mark.parametrize("names", [("steps",), pytest.param((*BOMBS,), marks=pytest.mark.slow)], ids=["one", "all"])
def test_a_server_answers_400_and_goes_on(names, model, tmp_path, monkeypatch, small):
    """The template's author names the words by which it loops and grows; clients may say them, and others go on."""
    from loopwise.serve.vllm import endpoint

    monkeypatch.setattr(endpoint, "Templates", lambda: small)
    monkeypatch.setattr(templates, "LATE", 1.0)
    monkeypatch.setenv("VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT", "8")
    file = tmp_path / "template.jinja"
    file.write_text(
        "".join(WORD.replace("NAME", n).replace("BOMB", BOMBS[n][0]) for n in BOMBS) + CYCLE + CHAT_TEMPLATE
    )
    asyncio.run(_ask(model[0], file, names))


async def _ask(folder: Path, file: Path, names: tuple[str, ...]) -> None:
    async with application(folder, flags=("--chat-template", str(file))) as app:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:

            async def ask(word: str, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
                messages = [{"role": "user", "content": word}]
                return await client.post(path, json={"messages": messages, "max_tokens": 1, **more})

            before = peak()
            assert (await ask("hello")).status_code == 200
            for name in names:
                for path in ("/v1/chat/completions", "/tokenize")[: 2 if name == "steps" else 1]:
                    reply = await ask(name, path)
                    assert reply.status_code == 400, (name, path, reply.text)
                    assert "the chat template" in reply.json()["error"]["message"], reply.text
                    assert (await ask("hello")).status_code == 200
            assert (await ask("hello", chat_template="{{ 1 }}")).status_code == 400  # of a request
            if len(names) > 1:  # and behind others
                many = await asyncio.gather(*(ask("endless") for _ in range(5)))
                assert [reply.status_code for reply in many] == [400] * 5
                assert (await ask("hello")).status_code == 200
            assert peak() - before < 2**27


@needs_vllm
@pytest.mark.slow
def test_a_request_s_own_template_is_bounded_where_it_is_allowed(model, monkeypatch, small):
    from loopwise.serve.vllm import endpoint

    monkeypatch.setattr(endpoint, "Templates", lambda: small)

    async def check() -> None:
        async with application(model[0], flags=("--trust-request-chat-template",)) as app:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
                before = peak()
                for template, status in ((BOMBS["constant"][0], 400), (LOOP, 400), ("{{ 'x' }}", 200)):
                    messages = [{"role": "user", "content": "a"}]
                    body = {"messages": messages, "max_tokens": 1, "chat_template": template}
                    reply = await client.post("/v1/chat/completions", json=body)
                    assert reply.status_code == status, reply.text
                assert peak() - before < 2**27

    asyncio.run(check())
