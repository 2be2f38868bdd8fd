"""A process that renders chat templates: a template is a program of its author, and may loop or grow.

`bounded` limits it as it limits templates in `loopwise train`, which needs a main thread and a process of its own: the
server's threads share one limit of memory. The process begins with `answer`, and imports no torch.
"""

from __future__ import annotations

import os
import pickle
import signal
from multiprocessing.connection import Connection
from typing import Any

from ...bounded import BYTES, bounded, limit_memory
from ...errors import UserError, reason

TEXT, ERROR, ENDS = b"+", b"-", b"!"  # first byte of an answer: a text; an error; one after which the process ends
LARGEST = 1 << 26  # bytes of a text: eight times as many as a body may have by default
ENDLESS = "the chat template"  # begins the messages of `bounded`


def answer(connection: Connection, size: int = BYTES) -> None:
    """Render the arguments that come, until the other end is closed.

    size: bytes of memory that this process may take more than it has now, for all templates together.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's, whose open requests go on
    limit_memory(size)
    parent = os.getppid()
    while os.getppid() == parent:  # the server runs
        try:
            request: tuple[float, dict[str, Any]] = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        seconds, arguments = request
        kind, found = TEXT, b""
        try:
            with bounded(ENDLESS, seconds):
                found = render_jinja_template(**arguments)[0][0].encode("utf-8", "surrogatepass")
            if len(found) > LARGEST:
                raise UserError(f"{ENDLESS} makes more than {LARGEST >> 20} MiB of text")
        except UserError as error:
            kind, found = ENDS, str(error).encode()
        except RecursionError:
            kind, found = ERROR, b"the chat template is nested too deeply"
        except Exception as error:  # a template may raise any
            kind, found = ERROR, reason(error).encode("utf-8", "replace")
        connection.send_bytes(kind + found)
        if kind == ENDS:
            return
