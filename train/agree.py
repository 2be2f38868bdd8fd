"""Facts that all ranks of a run must share: the checkpoint that the first one chose, and the data as it sees them.

Each rank reads OUT by itself. On a network file system one of them may see an older state of it for a while.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any, TypeVar

from loopwise.errors import UserError

from . import ranks
from .checkpoint import RUN, checksum, damage, last_sound
from .data import blocks
from .output import TOKENS

T = TypeVar("T")
WAIT = 60.0  # seconds for a file system that caches attributes; NFS does so for up to 60 s


def join() -> None:
    """Join the process group of the run. Does nothing for a run in one process."""
    import torch
    from accelerate import PartialState

    if ranks.count() > 1:
        PartialState(cpu=not torch.accelerator.is_available())


def from_first(value: T, group: Any = None) -> T:
    """The `value` of the first rank, in every rank. Every rank calls this, after `join`."""
    import torch

    values = [value]
    if ranks.count() > 1:
        torch.distributed.broadcast_object_list(values, group=group)
    return values[0]


def chosen(out: Path, resume: bool) -> Path | None:
    """The newest sound checkpoint of `out` as the first rank sees it, in every rank; None to begin anew.

    Every rank calls this. Raises UserError in all of them if one cannot see that checkpoint, or sees other data in
    `out`, after `WAIT` seconds.
    """
    import torch

    if ranks.count() == 1:
        return last_sound(out)[0] if resume else None
    checkpoint = last_sound(out)[0] if resume and ranks.is_first() else None
    name, expected = from_first((checkpoint and checkpoint.name, _seen(out, checkpoint)))
    checkpoint = out / name if name else None
    deadline = time.monotonic() + WAIT
    while (seen := _seen(out, checkpoint)) != expected and time.monotonic() < deadline:
        time.sleep(1)
    everywhere: list[Any] = [None] * ranks.count()
    torch.distributed.all_gather_object(everywhere, (socket.gethostname(), seen))
    for rank, (host, found) in enumerate(everywhere):
        if wrong := [what for what in found if found[what] != expected[what]]:
            raise UserError(
                f"rank {rank} on {host} does not see {' and '.join(wrong)} of {out} as rank 0 does: OUT must lie on a "
                "file system that all machines share"
            )
    return checkpoint


def _seen(out: Path, checkpoint: Path | None) -> dict[str, str]:
    """Facts of `out` as this rank sees them, by name."""
    try:
        tokens = blocks.load(out / TOKENS)
        held_out = 0 if tokens.held_out is None else len(tokens.held_out)
        found = {"the tokens": f"{tokens.digest} {len(tokens.train)} {held_out}"}
    except (OSError, ValueError, KeyError) as error:
        found = {"the tokens": str(error)}
    if checkpoint:
        record = checkpoint / RUN
        damaged = damage(checkpoint, thorough=False)
        found[checkpoint.name] = damaged or str(checksum(record))
    return found
