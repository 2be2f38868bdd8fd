"""Log-probabilities of the tokens, by the device: whichever tick samples them, and drafts of waves among them.

A position's values are those of its last read-out, which gave its token. They stand by position, modulo the tokens that
a step may give or have in flight, until the caller takes them after the step.
Shapes: R rows, m lanes that are read out, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .state import State

MOST = 20  # likeliest tokens of a position, vLLM's default of max_logprobs


class TokenLogprobs(NamedTuple):
    """The log-probabilities of one token.

    token, logprob: the sampled one, by the model's logits without temperature, penalties or cuts.
    rank: tokens at least as likely.   top: the likeliest tokens with theirs, as many as were asked for."""

    token: int
    logprob: float
    rank: int
    top: dict[int, float]


class Logprobs:
    """Records of all rows of a State. Allocated once a request asks for them."""

    def __init__(self, state: State, vocabulary: int):
        device = state.device
        self.requests, self.top = state.requests, min(MOST, vocabulary)
        self.room = self.requests.tokens.shape[1] + state.config.max_in_flight  # of a step, and in flight
        self.ids = torch.empty(0, dtype=torch.long, device=device)  # [R + 1, room, 1 + K], with the spare row
        self.values = torch.empty(0, device=device)
        self.ranks = torch.empty(0, dtype=torch.long, device=device)  # [R + 1, room]

    @property
    def nbytes(self) -> int:
        """Bytes of the records, once a request asks for them."""
        entry = (1 + self.top) * (self.ids.itemsize + self.values.itemsize) + self.ranks.itemsize
        return len(self.requests.live) * self.room * entry

    def note(self, logits: Tensor, tokens: Tensor, row: Tensor, position: Tensor) -> None:
        """Rows [m] have `tokens` [m] after positions [m], by logits [m, V]."""
        if not len(self.ids):
            shape = len(self.requests.live), self.room, 1 + self.top
            self.ids, self.values = self.ids.new_zeros(shape), self.values.new_zeros(shape)
            self.ranks = self.ranks.new_zeros(shape[:2])
        values = logits.float().log_softmax(-1)
        chosen = values.gather(-1, tokens[:, None])
        top = values.topk(self.top, -1)
        place = row, position % self.room
        self.ids.index_put_(place, torch.cat([tokens[:, None], top.indices], -1))
        self.values.index_put_(place, torch.cat([chosen, top.values], -1))
        self.ranks.index_put_(place, (values >= chosen).sum(-1))

    def newest(self, rows: list[int], counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the newest `counts[n]` tokens of `rows[n]`, one after the other, on the host: ids and values
        [sum of counts, 1 + K], the token's own first, and ranks [sum of counts]. Waits for the device."""
        row = torch.tensor(rows).repeat_interleave(torch.tensor(counts))
        back = torch.tensor([n for count in counts for n in range(count, 0, -1)], dtype=torch.long)
        row, back = row.to(self.ids.device), back.to(self.ids.device)
        at = (self.requests.next_position[row] - back) % self.room  # the position before a token gave it
        return self.ids[row, at].cpu(), self.values[row, at].cpu(), self.ranks[row, at].cpu()

    def of_row(self, row: int, count: int, top: int) -> list[TokenLogprobs]:
        """The newest `count` tokens of a row, with `top` likeliest tokens each."""
        parts = (part.tolist() for part in self.newest([row], [count]))
        return [
            TokenLogprobs(ids[0], values[0], rank, dict(list(zip(ids[1:], values[1:], strict=True))[:top]))
            for ids, values, rank in zip(*parts, strict=True)
        ]
