"""Masks of grammars, from the bits in which vLLM's scheduler sends them.

Shapes: m tokens to sample, V vocabulary, g requests with a grammar.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.core.sched.output import GrammarOutput

from .sampling import Mask


def mask_of(grammars: GrammarOutput | None, rows: dict[str, int], device: torch.device) -> Mask:
    """A function that gives tokens which the `grammars` exclude the logit -inf. `rows`: engine rows by request.

    A grammar's bits are int32 [g, V / 32], the lowest bit of a number first; 1 allows a token.
    """
    if grammars is None:
        return lambda logits, rows: None
    line = {rows[name]: n for n, name in enumerate(grammars.structured_output_request_ids) if name in rows}
    bits = np.ascontiguousarray(grammars.grammar_bitmask, dtype="<i4").view(np.uint8)
    excluded = torch.from_numpy(np.unpackbits(bits, axis=1, bitorder="little") == 0).to(device)

    def mask(logits: torch.Tensor, sampled: list[int]) -> None:
        which = [n for n, row in enumerate(sampled) if row in line]
        lines = excluded[[line[sampled[n]] for n in which], : logits.shape[1]]
        logits[which, : lines.shape[1]] = logits[which, : lines.shape[1]].masked_fill(lines, float("-inf"))

    return mask
