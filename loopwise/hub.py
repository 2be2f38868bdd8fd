"""Errors of the hub's client for a model or a dataset that it does not give, in words that need no host."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError, reason, shorten

# Classes of the hub's client, requests and httpx, of which none needs to be installed to be named.
SAID = {
    "DisabledRepoError": "the hub has disabled it",
    "GatedRepoError": "it is gated: ask for access, and log in with `hf auth login`",
    "RepositoryNotFoundError": "the hub has none of this name, or it needs `hf auth login`",
    "RevisionNotFoundError": "the hub has no such revision of it",
    "EntryNotFoundError": "the hub has it, but not the files of a model",
    "HFValidationError": "nor is it an id, OWNER/NAME, of the hub",
    "LocalTokenNotFoundError": "it needs a token: log in with `hf auth login`, or set HF_TOKEN",
}
STATUS = {
    401: "the hub refuses the token: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token has no right to it",
    404: "the hub has no such place",
    409: "another change came in between; repeat the command",
    429: "the hub has had too many requests; wait, and repeat the command",
}
# How names of errors end, of libraries that read over a network: they share no base class.
UNREACHED = (
    "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError", "Timeout", "MaxRetryError",
    "NameResolutionError", "ProxyError",
)  # fmt: skip


@contextmanager
def asking(said: Callable[[Exception], UserError]) -> Iterator[None]:
    """A block that asks the hub. `said(error)` is raised for an error of its client; a UserError passes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client raises many kinds: not found, gated, offline, no connection
        raise said(error) from None


def why_not(error: BaseException) -> str:
    """The reason of an `error` of the hub: the first known cause in its chain, else its own words."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # pyright: ignore[reportAssignmentType]
    names = [name for one in chain for name in (kind.__name__ for kind in type(one).__mro__)]
    known = next((SAID[name] for name in names if name in SAID and name != "EntryNotFoundError"), None)
    if known:
        return known
    status = next((code for one in chain if (code := _status(one))), None)
    if status and "RemoteEntryNotFoundError" not in names:  # of a missing file, transformers has better words
        said = STATUS.get(status, f"the hub answers with status {status}")
        return said + _words(chain) * (status == 403 or status not in STATUS)
    if any(name.endswith(UNREACHED) for name in names) or _offline():
        return "the hub is not asked offline" if _offline() else "the hub cannot be reached"
    return _without_host(reason(chain[0]))  # pyright: ignore[reportArgumentType]


def _status(error: BaseException) -> int | None:
    """The HTTP status of an `error` of the hub's client; None for any other."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) and status >= 400 else None


def _words(chain: list[BaseException]) -> str:
    """The server's own words in an error of the hub's client, behind a colon; "" without any."""
    words = next((text for one in chain if isinstance(text := getattr(one, "server_message", None), str) and text), "")
    return f": {_without_host(shorten(' '.join(words.split()), 200))}" if words else ""


def _without_host(text: str) -> str:
    """`text` with other words for addresses."""
    return re.sub(r"https?://\S+", "the hub", text).rstrip(".")


def is_hub_id(model: str) -> bool:
    """True for what may be the hub's OWNER/NAME: no existing path, and none in its looks."""
    looks = model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(("/", ".gguf"))
    return bool(model) and not looks and not os.path.lexists(model)


def snapshot_of(path: Path) -> Path | None:
    """The snapshot in the hub's cache that `path` is, or lies in; None elsewhere. Its name is the commit."""
    for folder in (path, *path.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith(("models--", "datasets--")):
            return folder
    return None


def is_valid_id(name: str) -> bool:
    """True for NAME or OWNER/NAME in the hub's letters."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def check_may_be_hub_id(model: str) -> None:
    """Raises UserError for what is no directory, and looks like a path rather than like the hub's OWNER/NAME."""
    if Path(model).is_file():
        raise UserError(f"{model} is a file; give the directory of a model, or a hub id")
    if not Path(model).is_dir() and not is_hub_id(model):
        raise UserError(f"{model}: no such model directory")


def not_found(model: str, error: BaseException, revision: str | None = None) -> UserError:
    """The error for a `model` that is no directory and that the hub does not give."""
    at = f" at revision {revision!r}" if revision else ""
    return UserError(f"{model}: no such directory, and no model of the hub{at} ({why_not(error)})")
