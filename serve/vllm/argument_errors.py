"""Wrong values of vLLM's arguments, in one line with flag, value and rule. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...errors import UserError
from .arguments import flag, names

# vLLM checks these only after its engine has started: existing files and directories, and numbers above 0.
PATHS = names("""
    tokenizer generation_config chat_template log_config_file ssl_keyfile ssl_certfile ssl_ca_certs
    tool_parser_plugin reasoning_parser_plugin
""")
POSITIVE = names("kv_cache_memory_bytes num_gpu_blocks_override")


def check_values(given: dict[str, Any]) -> None:
    """Raises UserError for a missing path, or a number of 0 or less, among the user's arguments `given`."""
    for name, value in given.items():
        if name in PATHS and isinstance(value, str) and value.startswith(("/", "./", "../", "~")):
            if not Path(value).expanduser().exists():
                raise UserError(f"{flag(name, value)}: no such file or directory")
        elif name in POSITIVE and isinstance(value, int) and value < 1:
            raise UserError(f"{flag(name, value)}: an integer above 0")


def explained(error: Exception, given: dict[str, Any]) -> str:
    """One line on an `error` that vLLM found in its arguments: flag and value, then the error's first sentence.

    The flag is the argument of `given`, the user's, that the error names; "vLLM:" where it names none.
    """
    found: Any = getattr(error, "errors", lambda: [])()  # pydantic's; the first one is shown
    if found and isinstance(own := found[0].get("ctx", {}).get("error"), UserError):
        return str(own)  # of our configuration hook
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    details: dict[str, Any] = found[0] if found else {"msg": str(message), "loc": ()}
    text = " ".join(details["msg"].removeprefix("Value error, ").split()) or type(error).__name__
    name = next((str(part) for part in details["loc"] if part in given), None) or _named(text, given)
    if name is None and "input" in details:  # vLLM has passed the value on under another name
        wrong = details["input"]
        name = next((n for n, value in given.items() if type(value) is type(wrong) and value == wrong), None)
    if name is None:
        name = next((n for n, v in given.items() if len(str(v)) > 2 and str(v).lower() in text.lower()), None)
    sentence = re.split(r"\. (?=[A-Z])", text)[0].rstrip(".")
    return f"{flag(name, given[name])}: {sentence}" if name else f"vLLM: {sentence}"


def _named(text: str, given: dict[str, Any]) -> str | None:
    """The first argument of `given` that `text` names, in any spelling."""
    places = {name: re.search(rf"\b{name.replace('_', '[ _-]')}\b", text, re.IGNORECASE) for name in given}
    return min((place.start(), name) for name, place in places.items() if place)[1] if any(places.values()) else None


def parsed(message: str) -> str:
    """argparse's `message` as one line; pydantic's errors in it have several."""
    lines = [line.strip() for line in message.splitlines()]
    if len(lines) > 2 and "validation error" in lines[0]:
        start = re.split(r": \d+ validation error", lines[0])[0]
        return f"{start}: {lines[1]}: {re.sub(r' .type=.*', '', lines[2])}"
    return " ".join(lines)
