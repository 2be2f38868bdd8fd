"""vLLM's workers with the runner of the lane engine."""

from __future__ import annotations

import gc
import os
import sys
import time
from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment
from vllm.v1.worker.worker_base import CompilationTimes

from ..api.lanes import AUTO
from .runner import LaneRunner


class LaneWorkerBase(Worker):
    """The part of a worker for lanes, on every platform."""

    model_runner: Any  # a LaneRunner; vLLM's classes are not its base

    def determine_available_memory(self) -> int:
        """Bytes for keys and values. The state of lanes and the graphs take some of them, unless the user set their
        number."""
        free, runner = super().determine_available_memory(), self.model_runner
        if self.cache_config.kv_cache_memory_bytes:
            return free
        return free - runner.state_bytes() - runner.graph_bytes()

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Compile and record what steps run, and measure it. vLLM's own kernels, which it would warm up, do not run."""
        steps, start = self.model_runner.steps, time.perf_counter()
        loop, lanes = steps.loop, steps.lanes
        # A packed matrix of vLLM's reads a tensor as it is finalized, which recurses without end while code is
        # compiled: what an engine before this one has left in cycles goes now.
        gc.collect()
        loop.warm_up()
        compiled, waves = time.perf_counter() - start, lanes.decoder == "wave"
        self._measure(loop, lanes)  # first: a budget bounds the sizes of graphs, and common ones outlive measured ones
        if loop.graph_tick:
            start = time.perf_counter()
            exits = ((steps.config.exit or {}).get("rule") or "fixed") != "fixed"
            loop.graph_tick.record_common(exits, lanes.max_in_flight if waves else 1)
            made, seconds = loop.graph_tick.cache.captures, time.perf_counter() - start
            if made:
                print(f"loopwise: {made} CUDA graphs recorded in {seconds:.0f} s", file=sys.stderr, flush=True)
        gc.freeze()  # vLLM's worker does so, too: what is there by now stays
        return CompilationTimes(compiled, 0.0)

    def _measure(self, loop: Any, lanes: Any) -> None:
        """Set budget and coda_wait by the measured costs of passes and read-outs, where one of them is AUTO.

        Waves draft by these costs, too.
        """
        drafts = lanes.decoder == "wave" and not (lanes.draft_every or lanes.draft_depths)
        if AUTO not in (lanes.budget, lanes.coda_wait) and not drafts:
            return
        group: Any = get_tp_group()
        costs = loop.measure(group.broadcast_object)
        if lanes.budget is AUTO:
            loop.eager_tick.budget = costs.knee()
        if lanes.coda_wait is AUTO:
            loop.schedule.costs = costs
        if group.is_first_rank:
            at = ", ".join(f"{n}: {s * 1e3:.1f} + {costs.reads[n] * 1e3:.1f}" for n, s in costs.passes.items())
            budget = loop.eager_tick.budget
            waves = f"waves fill a pass up to budget={budget} lanes; " if lanes.budget is AUTO else ""
            print(f"loopwise: {waves}pass and read-out by lanes, in ms: {at}", file=sys.stderr, flush=True)

    def recurrence_counts(self) -> dict[str, Any]:
        """As LaneSteps.counts."""
        return self.model_runner.steps.counts()


class GpuLaneWorker(LaneWorkerBase):
    def _make_model_runner(self) -> Any:
        assert self.device is not None, "a runner before its device"
        return LaneRunner(self.vllm_config, self.device)


if current_platform.is_cpu():  # this module puts what does nothing in the place of torch's streams and events
    from vllm.v1.worker.cpu_worker import CPUWorker

    class CpuLaneWorker(LaneWorkerBase, CPUWorker):
        def init_device(self) -> None:
            """As CPUWorker's, which makes a runner of its own."""
            self.device = torch.device("cpu")
            torch.set_num_threads = lambda number: None  # vLLM has bound the threads to cores
            # vLLM calls both on every platform. Two functions: torch.compile tells them apart.
            torch.accelerator.synchronize = lambda *_, **__: None
            torch.accelerator.empty_cache = lambda *_, **__: None
            method = self.distributed_init_method
            path = method.removeprefix("file://")
            os.environ["VLLM_DIST_IDENT"] = os.path.basename(path) if path != method else method.split(":")[-1]
            backend = current_platform.dist_backend
            init_worker_distributed_environment(self.vllm_config, self.rank, method, self.local_rank, backend)
            set_random_seed(self.model_config.seed)
            self.model_runner = LaneRunner(self.vllm_config, self.device)

    LaneWorker = CpuLaneWorker
else:
    LaneWorker = GpuLaneWorker
