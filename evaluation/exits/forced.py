"""Decoding with the data's own tokens, under an exit rule and a KV policy.

A *span* is a request of which the answer is known. The engine decodes it, and the next token is always the data's. So a
position leaves as in serving, and later ones attend to the keys and values that it left.
Shapes: m lanes of a call, D hidden size, V vocabulary, T tokens of a span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...serve.engine.exits import CHUNK, RULES
from ...serve.engine.loop import Prompt
from ...serve.engine.request import NEVER, Request
from ...serve.offline import Engine
from ...serve.params import Params


class Span(NamedTuple):
    """Token ids [T] of which the first `start` are a prompt, and the others its answer. 1 <= start < T.

    sequence: number of the sequence that it comes from.
    """

    ids: np.ndarray
    start: int
    sequence: int

    @property
    def answers(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.start


@dataclass
class Decoded:
    """One entry for each span.

    losses: sum over its answer [n] float64, in nats.   right: all its tokens were the likeliest ones [n].
    depths: recurrences of all its positions but the last [T - 1], prompt included.
    """

    losses: np.ndarray
    right: np.ndarray
    depths: list[list[int]]


# (rule, spans [m], their positions [m], depths [m] counted from 0, values [m]) of positions that give an answer's token
Watch = Callable[[str, Tensor, Tensor, Tensor, Tensor], None]


class ForcedEngine(Engine):
    """An Engine that decodes spans. Arguments are the Engine's."""

    def __init__(self, model: Any, **options: Any):
        super().__init__(model, cuda_graphs=False, **options)
        rows, device = self.max_num_seqs + 1, self.loop.state.device
        self.targets = torch.full((rows, self.max_model_len + 2), -1, device=device)  # token of a position; -1: unknown
        self.number = torch.zeros(rows, dtype=torch.long, device=device)  # span of the row
        self.loss = torch.zeros(rows, dtype=torch.float64, device=device)
        self.wrong = torch.zeros(rows, dtype=torch.long, device=device)

    def at_once(self, rule: str) -> bool:
        """True if all positions of a span may run together, as those of a prompt do.

        They may where no slot of the KV cache is overwritten, and the rule needs no coda of the positions before.
        """
        reads_coda = bool(self.config.coda) and RULES[rule].reads == "logits"
        return not self.loop.state.policy.overwrites and not reads_coda

    @torch.inference_mode()
    def decode(
        self,
        spans: Sequence[Span],
        params: Params,
        *,
        at_once: bool | None = None,
        watch: Watch | None = None,
        report: Callable[[], object] = lambda: None,
    ) -> Decoded:
        """Decode `spans` at the depth that `params` ask for.

        at_once: run the positions of a span together (default: where `at_once` allows it); the result is the same.
        watch: gets the values of the exit rule, which then never fires.   report: called after each span.
        Raises UserError for `params` that the model or its KV policy exclude.
        """
        rule = RULES[self.request(params).rule]
        request = replace(self.request(params), sampling="host", stops=())
        if watch:
            request.threshold = float("inf") if rule.rises else float("-inf")
        together = self.at_once(request.rule) if at_once is None else at_once
        request.wants_prompt_logits = together
        self.loop.rules.watch = watch and self._watch(watch)
        found = Decoded(np.zeros(len(spans)), np.zeros(len(spans), bool), [[] for _ in spans])
        try:
            self._decode(spans, request, together, found, report)
        finally:
            self.loop.rules.watch = None
        return found

    def depths_of(self, texts: Sequence[Sequence[int]], params: Params) -> list[list[int]]:
        """Recurrences of every token of `texts`, lists of token ids.

        The first token is a prompt, and runs to the end unless `params.prompt_exit`. The others follow as if they had
        been generated. Raises UserError for `params` that the model or its KV policy exclude.
        """
        spans = [Span(np.array([*ids, ids[-1]]), 1, 0) for ids in texts]  # a span's last token has no depth
        return self.decode(spans, params).depths

    def _decode(
        self, spans: Sequence[Span], request: Request, together: bool, found: Decoded, report: Callable[[], object]
    ) -> None:
        queue = sorted(range(len(spans)), key=lambda number: len(spans[number].ids))  # the longest first
        free, running = list(range(self.max_num_seqs)), dict[int, list[int]]()  # row -> [span, tokens brought in]
        try:
            while queue or running:
                while queue and free:
                    row = free.pop()
                    running[row] = [queue.pop(), 0]
                    self._begin(row, running[row][0], spans[running[row][0]], request)
                self._advance(spans, running, together)
                for row in self._through(spans, running, together):
                    number, _ = running.pop(row)
                    found.losses[number] = float(self.loss[row])
                    found.right[number] = not int(self.wrong[row])
                    found.depths[number] = self.loop.release(row)[: len(spans[number].ids) - 1].tolist()
                    free.append(row)
                    report()
        finally:
            for row in running:  # of what was broken off
                self.loop.release(row)

    def _begin(self, row: int, number: int, span: Span, request: Request) -> None:
        self.loop.admit(row, replace(request, max_tokens=span.answers))
        self.targets[row] = -1
        self.targets[row, span.start : len(span.ids)] = torch.from_numpy(span.ids[span.start :]).to(self.targets)
        self.number[row], self.loss[row], self.wrong[row] = number, 0, 0

    def _advance(self, spans: Sequence[Span], running: dict[int, list[int]], together: bool) -> None:
        """Bring tokens in as far as there are lanes, and run a step."""
        loop, room = self.loop, self.max_num_batched_tokens
        prompts, live = [], []
        for row in sorted(running):
            number, at = running[row]
            span = spans[number]
            last = len(span.ids) - 1 if together else span.start
            take = min(last - at, room)
            if loop.state.policy.overwrites and take < last - at:  # such a prompt cannot be cut
                take = last - at if not prompts else 0
            if at < last and not take:
                continue
            if take:
                wants_token = not together and at + take == last
                generated = span.start if together else NEVER
                tokens = torch.from_numpy(span.ids[at : at + take])
                prompts.append(Prompt(row, tokens, at, wants_token, generated))
                running[row][1] += take
                room -= take
            live.append(row)
        if prompts:
            loop.prompt(prompts)
        loop.step(torch.tensor(live, device=loop.state.device))

    def _through(self, spans: Sequence[Span], running: dict[int, list[int]], together: bool) -> list[int]:
        if together:
            return [row for row, (number, at) in running.items() if at == len(spans[number].ids) - 1]
        remaining = self.loop.state.requests.remaining.tolist()
        return [row for row in running if remaining[row] == 0]

    # ---- what the loop calls --------------------------------------------------------------------------------------
    def _read_prompt(self, x: Tensor, row: Tensor, position: Tensor) -> None:
        wanted = (self.targets[row, position + 1] >= 0).nonzero().squeeze(1)
        for some in wanted.split(CHUNK):
            self._score(self.loop.forward.logits(x[some]), row[some], position[some] + 1)

    def _sample(self, logits: Tensor, best: Tensor, row: Tensor, position: Tensor) -> Tensor:
        return self._score(logits, row, position)

    def _score(self, logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """Add the losses of logits [m, V] for positions [m] of rows [m]. Returns the true tokens [m]."""
        targets = self.targets[row, position]
        self.loss.index_add_(0, row, F.cross_entropy(logits.float(), targets, reduction="none").double())
        self.wrong.index_add_(0, row, (logits.argmax(-1) != targets).long())
        return targets

    def _watch(self, watch: Watch) -> Watch:
        def passed(rule: str, row: Tensor, position: Tensor, depth: Tensor, value: Tensor) -> None:
            mine = (self.targets[row, position + 1] >= 0).nonzero().squeeze(1)
            watch(rule, self.number[row[mine]], position[mine], depth[mine], value[mine])

        return passed
