"""The model runner of the lane engine: the methods that vLLM's workers call, in a plain class.

vLLM's worker owns the device: it measures memory, profiles, sleeps. In place of either of vLLM's own runners, this one
loads the model, allocates its KV cache, and makes the engine's loop, whose steps are in steps.py.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.utils.mem_utils import DeviceMemoryProfiler
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.utils import clear_layer_kv_caches
from vllm.v1.worker.workspace import reset_workspace_manager

from ..api.lanes import LaneConfig
from ..engine.attention.base import Attention
from ..engine.graphs import on_cuda, reserved_bytes
from ..engine.kv import policy_of
from ..engine.loop import Loop
from ..engine.loop_config import LoopConfig
from .arrivals import arrivals
from .attention import PagedAttention
from .kv_cache import allocate, kv_cache_spec
from .profiling import run_largest
from .prompt_logprobs import PromptLogprobs
from .sampling import LaneSampler
from .steps import LaneSteps


class LaneRunner:
    """Under vLLM's `Worker` and `CPUWorker`, which call the methods without an underscore."""

    is_pooling_model = False

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        self.vllm_config, self.device = vllm_config, device
        self.model_config, self.load_config = vllm_config.model_config, vllm_config.load_config
        self.max_model_len = vllm_config.model_config.max_model_len
        self.lanes = LaneConfig.of(vllm_config)
        self.kv_caches: list[torch.Tensor] = []
        self.model: Any = None  # a RecurrentDepthForCausalLM
        self.model_memory_usage = 0.0
        self.split = 1  # blocks of attention's kernels in a block of vLLM's scheduler, once that is known
        self.steps: LaneSteps | None = None

    # ---- the model ------------------------------------------------------------------------------------------------
    def load_model(self, load_dummy_weights: bool = False) -> None:
        """Load the checkpoint. Raises ValueError where its weights shall come later."""
        if load_dummy_weights:
            raise ValueError("lanes load their weights when they start")
        with nullcontext() if self.device.type == "cpu" else DeviceMemoryProfiler() as used:
            self.model = get_model(vllm_config=self.vllm_config)
        self.model_memory_usage = used.consumed_memory if used else 0.0  # vLLM asks for it on a GPU alone

    def get_model(self) -> Any:
        return self.model

    def get_draft_model(self) -> None:
        return None

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, torch.Tensor]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """As vLLM's runners. Keys and values of the old weights stay: the caller resets the prefix cache.

        Raises ValueError where steps would go on with old weights.
        """
        config = self.model.config
        if config.relaxation or config.time_conditioning:
            raise ValueError("reload_weights: relaxation and time_conditioning are set up once: start the engine anew")
        if self.lanes.compile and self.device.type == "cpu":
            raise ValueError("reload_weights: compiled passes keep a CPU's packed weights: compile=False")
        reload_weights(self.vllm_config, self.model, weights_iterator, weights_path, is_checkpoint_format)

    def forget(self) -> None:
        """Nothing is kept: vLLM's runners keep images and adapters, which lanes lack."""

    reset_mm_cache = reset_encoder_cache = reset_lora_state = forget

    def shutdown(self) -> None:
        """Let go of model and caches, so that another engine in this process finds their memory."""
        context = self.vllm_config.compilation_config.static_forward_context
        clear_layer_kv_caches(context.values())
        context.clear()
        self.kv_caches.clear()
        if self.model is not None:  # the engine may outlive its runner, and with it the model
            self.model.parts.attention = None
        self.model = self.steps = None
        _ROPE_DICT.clear()
        reset_workspace_manager()
        gc.collect()
        torch.accelerator.empty_cache()

    # ---- memory ---------------------------------------------------------------------------------------------------
    def profile_run(self, randomize_inputs: bool = False) -> None:
        """Run the largest pass and read-out. vLLM measures the memory that they take."""
        run_largest(self.model.parts, self._loop("meta", None, None).state, self.device)

    def warming_up_model(self) -> None:
        """On a CPU, vLLM compiles the model before it measures memory: here it is compiled afterwards."""

    def state_bytes(self) -> int:
        """Bytes of the loop's state: of its lanes and requests. The loop need not exist yet."""
        return self._loop("meta", None, None).nbytes

    def graph_bytes(self) -> int:
        """Bytes that graphs will hold, by an estimate."""
        if not self._records():
            return 0
        return reserved_bytes(self._sizes().most_read, self.model.config.vocab_size)

    def update_max_model_len(self, max_model_len: int) -> None:
        self.max_model_len = max_model_len

    # ---- the KV cache ---------------------------------------------------------------------------------------------
    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        return kv_cache_spec(self.vllm_config)

    def initialize_kv_cache(
        self,
        kv_cache_config: KVCacheConfig,
        is_profiling: bool = False,
        kv_cache_allocation_context: AbstractContextManager | None = None,
    ) -> None:
        """Allocate the cache of a `kv_cache_config`, and make the loop. Raises ValueError as `allocate` does."""
        made = allocate(self.vllm_config, kv_cache_config, self.device, kv_cache_allocation_context)
        self.kv_caches, self.split = made.caches, made.split
        self.steps = self._steps(made.block_size, made.builder)

    # ---- the loop -------------------------------------------------------------------------------------------------
    def _steps(self, block_size: int, builder: Any) -> LaneSteps:
        """The steps of a loop on blocks of `block_size`, of which `split` are one of vLLM's scheduler."""
        parts, rows, shared = self.model.parts, self.vllm_config.scheduler_config.max_num_seqs, arrivals()
        parts.attention = attention = self._attention(block_size, builder)
        sampler = LaneSampler(self.vllm_config, rows, self.device)
        reader = PromptLogprobs(self.model_config.logprobs_mode, sampler, lambda x: loop.forward.logits(x))
        loop = self._loop(self.device, attention, sampler, reader)
        if not isinstance(attention, PagedAttention):  # which waits for the device
            loop.use_graphs(on_cuda(self.device))
        loop.eager = shared is not None  # a server's: replies and new requests must not wait
        # Ranks would not hear of new requests in the same tick.
        arrived = shared.waiting if shared and get_tp_group().world_size == 1 else lambda: False
        return LaneSteps(loop, sampler, reader, self.model.config, self.lanes, self.split, arrived)

    def _sizes(self) -> LoopConfig:
        lanes, scheduler = self.lanes, self.vllm_config.scheduler_config
        block = self.vllm_config.cache_config.block_size
        return LoopConfig(
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=self.max_model_len,
            num_blocks=-(-(self.max_model_len + 1) // block) * self.split,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            passes_per_step=lanes.passes_per_step,
            max_lanes=lanes.max_lanes,
            coda_wait=lanes.coda_wait or 0,
            max_in_flight=lanes.max_in_flight,
            compile=lanes.compile,
        )

    def _loop(self, device: Any, attention: Any, sampler: Any, reader: Any = None) -> Loop:
        sizes, policy = self._sizes(), policy_of(self.model.config)
        return Loop(
            self.model.parts,
            attention,
            policy,
            sampler,
            sizes,
            dtype=self.model_config.dtype,
            device=device,
            reader=reader,
        )

    def _attention(self, block_size: int, builder: Any) -> Attention:
        """The engine's own kernels where graphs are recorded, otherwise vLLM's backend."""
        parts, paged = self.model.parts, PagedAttention
        if self._records():
            from .rotary import take_rotary  # these want Triton
            from .triton_attention import PagedTriton

            rotary = take_rotary(parts, self.model_config.dtype, self.device)
            return PagedTriton(parts.caches, parts.outer, block_size, rotary)
        if self.device.type == "cpu":
            from .cpu_attention import PagedCPU as paged  # which the wheel for GPUs lacks the operations for
        return paged(parts.caches, parts.outer, block_size, builder, self.lanes.compile)

    def _records(self) -> bool:
        """Graphs are wanted, on a GPU, and no backend of vLLM's is asked for. Several ranks do without graphs, in which
        their all-reduce would have to be."""
        alone = get_tp_group().world_size == 1 and self.device.type != "cpu"
        return self.lanes.graphs and self.vllm_config.attention_config.backend is None and alone

    # ---- a step ---------------------------------------------------------------------------------------------------
    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None) -> Any:
        """As LaneSteps.execute."""
        assert self.steps is not None, "a step before the KV cache"
        return self.steps.execute(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | None:
        """As LaneSteps.sample."""
        assert self.steps is not None, "a step before the KV cache"
        return self.steps.sample(grammar_output)

    def take_draft_token_ids(self) -> None:
        return None
