"""vLLM's sampler for lanes: several times a step, for the requests that have exited, with the engine's own noise.

Logits processors, penalties, cuts and log-probabilities are vLLM's. The noise is a function of (seed, position, token),
so a seeded request gives the same tokens whatever else runs. vLLM's processors identify requests by their row in its
batch, so rows that have not exited are padding. Shapes: n rows of vLLM's batch, m tokens to sample, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from ..api.decoders import history
from ..engine.isolation import Faults
from ..engine.sampling import Draws, signed, waiting_times


class NoisySampler(Sampler):
    """vLLM's sampler, but random tokens are argmax p / noise, with `noise` [n, V] set beforehand."""

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

    batch: returns vLLM's input batch.   requests: vLLM's request states, by name.
    """

    def __init__(self, logprobs_mode: Any, batch: Callable[[], Any], requests: dict[str, Any], rows: int, device: Any):
        self.sampler, self.draws = NoisySampler(logprobs_mode), Draws(rows, device)
        self.sampling: dict[int, str] = {}  # engine row -> Request.sampling
        self.in_use: Any = None  # the engine's: sampling methods of the running requests
        self.batch, self.requests = batch, requests
        self.name_of: dict[int, str] = {}  # engine row -> request
        self.seed: dict[int, int] = {}
        self.logprobs: list[tuple[torch.Tensor, LogprobsTensors]] = []  # this step's: rows of the batch, values
        self.appended: dict[str, int] = {}  # tokens of this step that are in the request's state already
        self.drafts: dict[int, bool] = {}  # engine row -> True where its tokens are drafts until the engine emits them
        self.known_tokens: torch.Tensor | None = None  # the engine's
        self.faults = Faults()  # this step's, by engine row

    def admit(self, row: int, name: str, decoder: str) -> None:
        """Put request `name`, with this `decoder`, into engine row `row`. Sets its seed and its sampling method."""
        params = self.requests[name].sampling_params
        self.name_of[row], self.drafts[row] = name, decoder != "plain"
        digest = hashlib.sha256(name.encode()).digest()  # the default seed, equal on all ranks
        seed = self.seed[row] = int.from_bytes(digest[:7], "big") if params.seed is None else signed(params.seed)
        top_k = max(params.top_k, 0)
        sampling = self.draws.admit(row, params.temperature, top_k, params.top_p, params.min_p, seed)
        self.sampling[row] = "host" if self._needs_vllm(params) else sampling

    def _needs_vllm(self, p: Any) -> bool:
        """True where vLLM's sampler does more for these params than argmax, or cuts and a random token."""
        builtin = all(type(processor) in BUILTIN_LOGITS_PROCESSORS for processor in self.batch().logitsprocs.all)
        return not builtin or history(p) is not None or bool(p.logit_bias or p.allowed_token_ids)

    def start_step(self) -> None:
        """Forget the log-probabilities, tokens and faults of the step before."""
        self.logprobs, self.appended = [], {}
        self.faults.clear()

    def __call__(
        self,
        logits: torch.Tensor,
        best: torch.Tensor,
        row: torch.Tensor,
        position: torch.Tensor,
        mask: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """logits [m, V] of engine rows [m] for the tokens at positions [m] -> tokens [m].

        best [m]: the argmax of the logits.   mask: changes logits [n, V] in place, for a grammar. Adds tokens to vLLM's
        request states, as `appended` counts them, and log-probabilities to `logprobs`; exceptions of single requests to
        `faults`.
        """
        draws, by_vllm = partial(self.draws, in_use=self.in_use), partial(self._sample, mask=mask)
        tokens = self.faults.sample(draws, logits, best, row, position)
        if mask is None and not self.in_use["host"]:
            return tokens
        rounds: list[list[int]] = []  # vLLM's sampler takes one token per request
        seen: dict[int, int] = {}
        for n, r in enumerate(row.tolist()):
            if mask is None and self.sampling[r] != "host":
                continue
            seen[r] = seen.get(r, -1) + 1
            rounds[seen[r] : seen[r] + 1] = [[*(rounds[seen[r]] if seen[r] < len(rounds) else ()), n]]
        for some in rounds:
            which = torch.tensor(some, device=logits.device)
            some_of = (each[which] for each in (logits, best, row, position))
            tokens[which] = self.faults.sample(by_vllm, *some_of)
        return tokens

    def _sample(
        self,
        logits: torch.Tensor,
        best: torch.Tensor,
        row: torch.Tensor,
        position: torch.Tensor,
        mask: Callable | None,
    ) -> torch.Tensor:
        """As __call__, for rows that differ, with vLLM's sampler. `best` is not needed."""
        rows, batch = row.tolist(), self.batch()
        metadata = batch.sampling_metadata
        at = torch.tensor([batch.req_id_to_index[self.name_of[r]] for r in rows], device=logits.device)
        whole = logits.new_zeros(batch.num_reqs, logits.shape[1], dtype=torch.float32)
        whole[at] = logits.float()
        if mask is not None:
            mask(whole)
        for processor in metadata.logitsprocs.all:
            processor.update_state(None)  # vLLM does so once a step; lanes sample several times in one
        if not metadata.all_greedy:
            seed = torch.tensor([self.seed[r] for r in rows], device=logits.device)
            self.sampler.noise = whole.new_ones(whole.shape, dtype=torch.double)
            self.sampler.noise[at] = waiting_times(seed, torch.zeros_like(seed), position, logits.shape[1])
        out = self.sampler(whole, dataclasses.replace(metadata, generators={}))
        tokens = out.sampled_token_ids[at, 0].long()
        assert self.known_tokens is not None, "sampling without an engine"
        known = (self.known_tokens[row, position] > 0).tolist()
        new = [n for n, r in enumerate(rows) if not known[n] and not self.drafts[r]]  # certain to be emitted
        for n in new:
            name = self.name_of[rows[n]]
            self.requests[name].output_token_ids.append(int(tokens[n]))  # penalties read it before the step ends
            self.appended[name] = self.appended.get(name, 0) + 1
        if (values := out.logprobs_tensors) is not None and new:
            at = at[new]
            chosen = values.logprob_token_ids[at], values.logprobs[at], values.selected_token_ranks[at]
            self.logprobs.append((at, LogprobsTensors(*chosen)))
        return tokens

    def lists(self, names: list[str], counts: list[int]) -> LogprobsLists | None:
        """Log-probabilities of this step's tokens; None without any.

        Requests are in the order of `names`, with `counts` tokens each. Those that asked for none have zeros.
        """
        if not self.logprobs:
            return None
        index = self.batch().req_id_to_index
        order = {index[name]: place for place, name in enumerate(names)}
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        first = self.logprobs[0][1]
        out = [torch.zeros(starts[-1], *part.shape[1:], dtype=part.dtype) for part in first[:3]]
        seen = dict.fromkeys(order, 0)
        for at, values in self.logprobs:
            places = []
            for row in at.tolist():
                places.append(starts[order[row]] + seen[row])
                seen[row] += 1
            for whole, part in zip(out, values[:3], strict=True):
                whole[torch.tensor(places)] = part.cpu()
        tokens, logprobs, ranks = (part.numpy() for part in out)
        return LogprobsLists(tokens, logprobs, ranks, starts)
