"""The attributes of vLLM's model runner and worker that the lane engine reads, with their types.

vLLM has a class of each for every platform. `LaneSteps` and `LaneWork` are mixed into them, and inherit from these.
Nothing here has a value: at run time, all is vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from vllm.config import CacheConfig, ModelConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.utils import AttentionGroup


class RequestState(Protocol):
    """vLLM's CachedRequestState of a request that generates text from token ids."""

    sampling_params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    num_computed_tokens: int
    in_progress_prompt_logprobs_cpu: LogprobsTensors | None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and text."""
        ...


class RunnerAttributes:
    """A model runner: the model, its settings, and vLLM's books of requests."""

    vllm_config: VllmConfig
    model_config: ModelConfig
    model: Any  # a RecurrentDepthForCausalLM
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    requests: dict[str, RequestState]
    input_batch: InputBatch
    num_prompt_logprobs: dict[str, int]
    attn_groups: list[list[AttentionGroup]]
    _update_states: Callable[[SchedulerOutput], Any]


class WorkerAttributes:
    """A worker: one process of a tensor-parallel group."""

    vllm_config: VllmConfig
    cache_config: CacheConfig
    device: torch.device | None
    model_runner: Any  # a LaneSteps
    use_v2_model_runner: bool
