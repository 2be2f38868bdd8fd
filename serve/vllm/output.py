"""The output of a step of lanes: vLLM's, the work of each token, and the requests that failed."""

from __future__ import annotations

import contextlib
import sys
import traceback
from dataclasses import dataclass, field

from vllm.v1.outputs import ModelRunnerOutput


@dataclass
class LaneOutput(ModelRunnerOutput):
    """work: for each token in `sampled_token_ids` three numbers: its recurrences, then the request's passes of the core
    and the lanes in them, both counted since its prompt.   failed: the requests that an exception ended; true where the
    step has computed their keys and values."""

    work: list[list[tuple[int, int, int]]] = field(default_factory=list)
    failed: dict[str, bool] = field(default_factory=dict)


def print_fault(name: str, error: BaseException) -> None:
    """Print the exception that ends request `name`. The others go on where nothing can be printed: the disk may be
    full."""
    with contextlib.suppress(OSError):
        print(f"loopwise: request {name} ends by an error:", file=sys.stderr)
        traceback.print_exception(error, file=sys.stderr)
        sys.stderr.flush()
