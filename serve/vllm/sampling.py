"""vLLM's sampler for lanes: several times a step, for the requests that have exited, with the engine's own noise.

Logits processors, penalties, cuts and log-probabilities are vLLM's. The noise is a function of (seed, position, token),
so a seeded request gives the same tokens whatever else runs. Shapes: m tokens to sample, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from ..api.decoders import history
from ..engine.isolation import Faults
from ..engine.sampling import Draws, signed, waiting_times
from .held import Held
from .metadata import metadata_of
from .processors import Processors

Mask = Callable[[torch.Tensor, list[int]], None]  # changes logits [m, V] of engine rows [m] in place, for grammars


class NoisySampler(Sampler):
    """vLLM's sampler, but random tokens are argmax p / noise, with `noise` [m, V] set beforehand."""

    def __init__(self, logprobs_mode: Any):
        super().__init__(logprobs_mode)
        self.noise: torch.Tensor | None = None
        self.topk_topp_sampler.forward = self._draw

    def _draw(self, logits, generators, k, p) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self.noise is not None, "sampling without noise"
        logits = apply_top_k_top_p(logits, k, p)
        kept = None
        if self.logprobs_mode == "processed_logits":
            kept = logits
        elif self.logprobs_mode == "processed_logprobs":
            kept = logits.log_softmax(-1, dtype=torch.float32)
        return (logits.double().softmax(-1) / self.noise).argmax(-1), kept


class LaneSampler:
    """Samples the tokens of `rows` of the engine. Requests that do not need vLLM's sampler are sampled on the device.

    requests: by engine row.
    """

    def __init__(self, vllm_config: Any, rows: int, device: Any):
        model = vllm_config.model_config
        self.sampler, self.draws = NoisySampler(model.logprobs_mode), Draws(rows, device)
        self.processors, self.vocabulary, self.device = Processors(vllm_config, device), model.get_vocab_size(), device
        self.requests = self.processors.requests
        self.logprobs_mode = model.logprobs_mode
        self.noted: dict[int, int] = {}  # engine row -> its `logprobs`, where the engine computes them
        self.records: Any = None  # the engine's Logprobs
        self.sampling: dict[int, str] = {}  # engine row -> Request.sampling
        self.in_use: Any = None  # the engine's: sampling methods of the running requests
        self.seed: dict[int, int] = {}
        self.logprobs: list[tuple[list[int], LogprobsTensors]] = []  # this step's: engine rows, values
        self.drafts: dict[int, bool] = {}  # engine row -> True where its tokens are drafts until the engine emits them
        self.known_tokens: torch.Tensor | None = None  # the engine's
        self.faults = Faults()  # this step's, by engine row
        self.metadata: SamplingMetadata | None = None  # of the last call

    def admit(self, row: int, request: Held, decoder: str) -> None:
        """Put `request`, with this `decoder`, into engine row `row`. Sets its seed and its sampling method."""
        params = request.params
        self.processors.add(row, request)
        self.drafts[row] = decoder != "plain"
        digest = hashlib.sha256(request.name.encode()).digest()  # the default seed, equal on all ranks
        seed = self.seed[row] = int.from_bytes(digest[:7], "big") if params.seed is None else signed(params.seed)
        top_k = max(params.top_k, 0)
        sampling = self.draws.admit(row, params.temperature, top_k, params.top_p, params.min_p, seed)
        self.sampling[row] = "host" if self._needs_vllm(params) else sampling
        self.noted.pop(row, None)
        if params.logprobs is not None and history(params, self.logprobs_mode) is None:
            self.noted[row] = params.logprobs

    def release(self, row: int) -> None:
        """The request in engine row `row` has ended, or pauses."""
        self.processors.remove(row)

    def _needs_vllm(self, p: Any) -> bool:
        """True where vLLM's sampler does more for these params than argmax, or cuts and a random token."""
        own = self.processors.any_of_users
        return own or history(p, self.logprobs_mode) is not None or bool(p.logit_bias or p.allowed_token_ids)

    def start_step(self) -> None:
        """Forget the log-probabilities and faults of the step before."""
        self.logprobs = []
        self.faults.clear()

    def __call__(
        self,
        logits: torch.Tensor,
        best: torch.Tensor,
        row: torch.Tensor,
        position: torch.Tensor,
        mask: Mask | None = None,
    ) -> torch.Tensor:
        """logits [m, V] of engine rows [m] for the tokens at positions [m] -> tokens [m].

        best [m]: the argmax of the logits. Adds tokens to the requests' `output`, as `appended` counts them, and
        log-probabilities to `logprobs`; exceptions of single requests to `faults`.
        """
        draws, by_vllm = partial(self.draws, in_use=self.in_use), partial(self._sample, mask=mask)
        tokens = self.faults.sample(draws, logits, best, row, position)
        if mask is None and not self.in_use["host"]:
            return tokens
        for some in self._rounds(row.tolist(), every=mask is not None):
            which = torch.tensor(some, device=logits.device)
            some_of = (each[which] for each in (logits, best, row, position))
            tokens[which] = self.faults.sample(by_vllm, *some_of)
        return tokens

    def _rounds(self, rows: list[int], every: bool) -> list[list[int]]:
        """Calls of vLLM's sampler for engine `rows`: it takes one token per request, and log-probabilities of the
        likeliest tokens or of given ones. `every`: of all rows, not of those alone that need it."""
        rounds: dict[tuple[int, bool], list[int]] = {}
        seen: dict[int, int] = {}
        for n, r in enumerate(rows):
            if every or self.sampling[r] == "host":
                seen[r] = seen.get(r, -1) + 1
                rounds.setdefault((seen[r], bool(self.requests[r].params.logprob_token_ids)), []).append(n)
        return [rounds[key] for key in sorted(rounds)]

    def _sample(
        self, logits: torch.Tensor, best: torch.Tensor, row: torch.Tensor, position: torch.Tensor, mask: Mask | None
    ) -> torch.Tensor:
        """As __call__, for rows that differ, with vLLM's sampler. `best` is not needed."""
        rows = row.tolist()
        requests = [self.requests[r] for r in rows]
        logits = logits.to(torch.float32, copy=True)  # a call that raises leaves no trace
        if mask is not None:
            mask(logits, rows)
        if not self.processors.start_call(requests, row) or self.metadata is None:
            self.metadata = None
            self.metadata = metadata_of(requests, self.vocabulary, self.processors.of_call, self.device)
        if not self.metadata.all_greedy:
            seed = torch.tensor([self.seed[r] for r in rows], device=logits.device)
            self.sampler.noise = waiting_times(seed, torch.zeros_like(seed), position, logits.shape[1])
        out = self.sampler(logits, self.metadata)
        tokens = out.sampled_token_ids[:, 0].long()
        assert self.known_tokens is not None, "sampling without an engine"
        known = (self.known_tokens[row, position] > 0).tolist()
        new = [n for n, r in enumerate(rows) if not known[n] and not self.drafts[r]]  # certain to be emitted
        values = tokens.tolist()
        for n in new:
            requests[n].output.append(values[n])  # penalties read it before the step ends
            requests[n].appended += 1
        if (found := out.logprobs_tensors) is not None and (ours := [n for n in new if rows[n] not in self.noted]):
            chosen = found.logprob_token_ids[ours], found.logprobs[ours], found.selected_token_ranks[ours]
            self.logprobs.append(([rows[n] for n in ours], LogprobsTensors(*chosen)))
        return tokens

    def lists(self, rows: list[int], counts: list[int]) -> LogprobsLists | None:
        """Log-probabilities of this step's tokens; None without any.

        Requests are in the order of engine `rows`, with `counts` tokens each; further counts are of requests without a
        row. Those that asked for none, or for fewer than others, have zeros.
        """
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        place = dict(zip(rows, starts, strict=False))  # of a row's next token
        parts = self.logprobs + self._noted(rows, counts)
        if not parts:
            return None
        width = max(values.logprobs.shape[1] for _, values in parts)
        shapes = zip(parts[0][1][:3], ((starts[-1], width), (starts[-1], width), (starts[-1],)), strict=True)
        out = [torch.zeros(shape, dtype=part.dtype) for part, shape in shapes]
        for sampled, values in parts:
            places = []
            for row in sampled:
                places.append(place[row])
                place[row] += 1
            for whole, part in zip(out, values[:3], strict=True):
                whole[(torch.tensor(places), *(slice(size) for size in part.shape[1:]))] = part.to(whole.dtype).cpu()
        tokens, logprobs, ranks = (part.numpy() for part in out)
        return LogprobsLists(tokens, logprobs, ranks, starts)

    def _noted(self, rows: list[int], counts: list[int]) -> list[tuple[list[int], LogprobsTensors]]:
        """The engine's log-probabilities of this step's tokens, as in `logprobs`: `counts[n]` of `rows[n]`."""
        given = {row: count for row, count in zip(rows, counts, strict=False) if count and row in self.noted}
        if not given:
            return []
        ids, values, ranks = self.records.newest(list(given), list(given.values()))
        width = 1 + max(self.noted[row] for row in given)
        sampled = [row for row, count in given.items() for _ in range(count)]
        return [(sampled, LogprobsTensors(ids[:, :width], values[:, :width], ranks))]
