"""Chat templates of a server, rendered in a process of their own: their time and memory are bounded."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from ...bounded import BYTES, SECONDS
from .template_process import ENDS, LARGEST, TEXT, answer

LATE = 5.0  # seconds until the process is killed, where the template's time is up and Python gets no turn
# Arguments of `apply_chat_template` for the text's encoding, which vLLM does itself.
ENCODING = ("padding", "truncation", "max_length", "return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs")
# Variables that hold a chat's messages, of a template. vLLM 0.32 finds those that are set to one another for ever.
ALIASES = 1000
START = 60.0  # seconds that the process may take to import its libraries


class TemplateError(ValueError):
    """A template that refuses a conversation, or that goes beyond its limits. vLLM answers with its text and 400."""


class Templates:
    """Renders in another process, which starts with the first conversation, and anew after one that has been ended.

    seconds: of one conversation.   size: bytes of memory for all templates.
    """

    def __init__(self, seconds: float = SECONDS, size: int = BYTES):
        self.seconds, self.size = seconds, size
        self.process: SpawnProcess | None = None
        self.connection: Connection | None = None
        self.lock = threading.Lock()

    def render(self, **arguments: Any) -> str:
        """The text of `render_jinja_template(**arguments)` for one conversation. Called in any thread.

        Raises TemplateError for a template that refuses it, does not end, or takes too much memory.
        """
        request = pickle.dumps((self.seconds, arguments))
        with self.lock:
            try:
                found = self._ask(request)
            except (EOFError, OSError):  # the kernel has ended it for want of memory
                found = ENDS + b"the chat template has ended the process that renders it"
            if found[:1] == ENDS:
                self.end()
        if found[:1] != TEXT:
            raise TemplateError(found[1:].decode("utf-8", "replace"))
        return found[1:].decode("utf-8", "surrogatepass")

    def _ask(self, request: bytes) -> bytes:
        started = self.process is None or not self.process.is_alive()
        if started:
            self._start()
        assert self.connection is not None
        self.connection.send_bytes(request)
        if not self.connection.poll(self.seconds + LATE + (START if started else 0)):
            return ENDS + f"the chat template does not end within {self.seconds:g} s".encode()
        return self.connection.recv_bytes(LARGEST + 1)

    def _start(self) -> None:
        self.end()
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=answer, args=(other, self.size), name="templates", daemon=True)
        self.process.start()
        other.close()

    def end(self) -> None:
        """End the process, if there is one."""
        if self.connection is not None:
            self.connection.close()
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = self.connection = None


class Elsewhere:
    """A tokenizer whose chat template is rendered by `templates`; all else is `tokenizer`'s."""

    def __init__(self, tokenizer: Any, templates: Templates):
        self._tokenizer = tokenizer

        @functools.wraps(tokenizer.apply_chat_template)  # vLLM looks at its parameters
        def apply_chat_template(
            conversation: Any,
            tools: Any = None,
            chat_template: str | None = None,
            add_generation_prompt: bool = False,
            continue_final_message: bool | str = False,
            tokenize: bool = True,
            return_dict: bool = False,
            **more: Any,
        ) -> str | list[int]:
            if not conversation:
                raise TemplateError("messages: a chat has one at least")
            if continue_final_message and add_generation_prompt:
                raise TemplateError("continue_final_message and add_generation_prompt exclude each other")
            text = templates.render(
                conversations=[list(conversation)],
                tools=tools,
                chat_template=tokenizer.get_chat_template(chat_template, tools),
                continue_final_message=continue_final_message,
                add_generation_prompt=add_generation_prompt,
                **tokenizer.special_tokens_map | {name: value for name, value in more.items() if name not in ENCODING},
            )
            return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if tokenize else text

        self.apply_chat_template = apply_chat_template

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def render_elsewhere(templates: Templates) -> None:
    """Let vLLM's renderer of chats render by `templates`, in this process and from now on."""
    from vllm.renderers import hf

    apply: Any = getattr(hf.safe_apply_chat_template, "__wrapped__", hf.safe_apply_chat_template)

    @functools.wraps(apply)
    def elsewhere(model_config: Any, tokenizer: Any, conversation: Any, **more: Any) -> Any:
        return apply(model_config, Elsewhere(tokenizer, templates), conversation, **more)

    hf.safe_apply_chat_template, hf._try_extract_ast = elsewhere, parsed
    hf._cached_resolve_chat_template_kwargs = variables
    search: Any = getattr(hf._iter_nodes_assign_var_or_elems, "__wrapped__", hf._iter_nodes_assign_var_or_elems)

    @functools.wraps(search)
    def ended(root: Any, name: str) -> Iterator[Any]:
        return itertools.islice(search(root, name), ALIASES)

    hf._iter_nodes_assign_var_or_elems = ended


def follow(renderer: Any) -> None:
    """Let a `renderer` of vLLM's that has been made before `render_elsewhere` do the same.

    A conversation that waits too long behind others is refused as theirs are: vLLM would answer with status 500.
    """
    from vllm.renderers import hf
    from vllm.utils.async_utils import make_async

    if not isinstance(renderer, hf.HfRenderer):  # others have no templates
        return
    within: Any = renderer._render_with_timeout

    async def in_time(coro: Any) -> Any:
        try:
            return await within(coro)
        except TimeoutError:
            raise TemplateError("the chat template does not end, or conversations before this one did not") from None

    renderer._apply_chat_template_async = make_async(hf.safe_apply_chat_template, executor=renderer._executor)
    renderer._render_with_timeout = in_time


@functools.lru_cache(maxsize=32)
def parsed(chat_template: str) -> Any:
    """The syntax tree of a template, by which vLLM finds the form of its messages; None for one that has none.

    vLLM compiles it for that, and Jinja computes the constants in it meanwhile: `'x' * 10**10` is one.
    """
    from transformers.utils import chat_template_utils

    try:
        return chat_template_utils._compile_jinja_template("").environment.parse(chat_template)
    except Exception:  # a template with an error is refused when it is rendered
        return None


def variables(chat_template: str) -> frozenset[str]:
    """The variables that a template reads, its own among them: vLLM gives it those that a request has.

    Jinja's own search leaves its own out, and computes constants.
    """
    from jinja2 import nodes

    tree = parsed(chat_template)
    return frozenset(node.name for node in tree.find_all(nodes.Name) if node.ctx == "load") if tree else frozenset()
