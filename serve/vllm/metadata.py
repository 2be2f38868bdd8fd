"""vLLM's description of how requests sample, for the requests of one call of its sampler.

Shapes: m requests, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata

from .held import Held


def metadata_of(
    requests: list[Held], vocabulary: int, processors: LogitsProcessors, device: torch.device
) -> SamplingMetadata:
    """The metadata of `requests` [m], whose lists of output tokens it refers to. Random tokens need no generators of
    vLLM's."""
    params = [request.params for request in requests]

    def tensor(values: list[Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    greedy = [p.sampling_type == SamplingType.GREEDY for p in params]
    temperature = [0.0 if g else p.temperature for g, p in zip(greedy, params, strict=True)]
    top_k = [p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params]
    top_p = [p.top_p for p in params]
    frequency = [p.frequency_penalty for p in params]
    presence = [p.presence_penalty for p in params]
    repetition = [p.repetition_penalty for p in params]
    plain = not any(frequency) and not any(presence) and set(repetition) == {1}
    none = torch.empty(0, device=device)  # where nothing is penalised, vLLM looks at no penalty
    wanted = [vocabulary if p.logprobs == -1 else p.logprobs for p in params if p.logprobs is not None]
    return SamplingMetadata(
        temperature=None if all(greedy) else tensor(temperature),
        all_greedy=all(greedy),
        all_random=not any(greedy),
        top_p=tensor(top_p) if min(top_p) < 1 else None,
        top_k=tensor(top_k, torch.int32) if min(top_k) < vocabulary else None,
        generators={},
        max_num_logprobs=max(wanted, default=None),
        no_penalties=plain,
        prompt_token_ids=None
        if plain
        else _padded([request.prompt_ids for request in requests], vocabulary).to(device),
        frequency_penalties=none if plain else tensor(frequency),
        presence_penalties=none if plain else tensor(presence),
        repetition_penalties=none if plain else tensor(repetition),
        output_token_ids=[request.output for request in requests],
        allowed_token_ids_mask=_masked(params, vocabulary, device),
        bad_words_token_ids={n: p.bad_words_token_ids for n, p in enumerate(params) if p.bad_words_token_ids},
        logitsprocs=processors,
        logprob_token_ids={n: p.logprob_token_ids for n, p in enumerate(params) if p.logprob_token_ids} or None,
    )


def _padded(prompts: list[torch.Tensor], vocabulary: int) -> torch.Tensor:
    """Tokens [m, longest], filled with the number `vocabulary`, which is no token's."""
    return torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=vocabulary)


def _masked(params: list[SamplingParams], vocabulary: int, device: torch.device) -> torch.Tensor | None:
    """[m, V]: True for tokens that a request may not have; None where all may have all."""
    if not any(p.allowed_token_ids for p in params):
        return None
    masked = torch.zeros(len(params), vocabulary, dtype=torch.bool)
    for n, p in enumerate(params):
        if p.allowed_token_ids:
            masked[n] = True
            masked[n, p.allowed_token_ids] = False
    return masked.to(device)
