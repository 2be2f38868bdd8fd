"""A worker process of `loopwise convert`, started by `workers.work`: a job in the first line of stdin, then units."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError


def main() -> int:
    """Write the units whose numbers come on stdin, and reply to each with a line on stdout. Returns the exit code."""
    first: dict[str, Any] = json.loads(sys.stdin.readline())
    _end_with(first["parent"])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints does not break the replies

    def reply(**fields: Any) -> None:
        print(json.dumps(fields), file=replies, flush=True)

    try:
        _work(first, reply)
    except UserError as error:
        reply(refused=str(error))
    except OSError as error:
        reply(failed=[error.errno, error.strerror])
    return 0


def _work(first: dict[str, Any], reply: Any) -> None:
    """Open the source as the conversion did, and write units until stdin ends."""
    from ..quiet import quiet

    quiet()
    from .journal import tensors_digest
    from .pending import units
    from .pipeline import opened
    from .recipe import ConvertRecipe
    from .shards import Shards
    from .source import Compared

    recipe, compared = ConvertRecipe.model_validate(first["recipe"]), Compared(**first["compared"])
    with opened(Path(first["path"]), recipe, compared=compared) as conversion:
        if tensors_digest(conversion.pending) != first["tensors"]:
            raise UserError(f"{first['path']} has changed while it was converted")
        shards = Shards(conversion.pending, Path(first["directory"]), first["shard_bytes"])
        work = units(conversion.pending)
        reply(ready=True)
        for line in sys.stdin:
            number = int(line)
            done = shards.write(work[number])
            reply(unit=number, checksums=done.checksums, error=done.error)


def _end_with(parent: int) -> None:
    """Let the kernel end this process with its parent, whose lock on the output is free then."""
    if sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
