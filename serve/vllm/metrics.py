"""Prometheus metrics of the lane engine on vLLM's /metrics, read from the worker at every scrape."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector

PATIENCE = 1.0  # seconds that a scrape waits for the engine, which answers between two steps


class DepthMetrics(Collector):
    """Counters of the lane engine. counts: the worker's `recurrence_counts`; empty until the first scrape."""

    def __init__(self, model: str):
        self.model = model
        self.counts: dict[str, Any] = {}
        self.reading: asyncio.Task | None = None
        REGISTRY.register(self)

    async def update(self, engine_client: Any) -> None:
        """Read `counts` anew, or leave those of before where the engine does not answer within PATIENCE.

        However many scrapes come, the engine gets one question at a time.
        """
        if engine_client.errored:
            return
        if self.reading is None or self.reading.done():
            self.reading = asyncio.get_running_loop().create_task(self._read(engine_client))
        await asyncio.wait({self.reading}, timeout=PATIENCE)

    async def _read(self, engine_client: Any) -> None:
        """Read `counts` from the first tensor-parallel rank; all ranks count the same."""
        from vllm.v1.engine.exceptions import EngineDeadError

        with contextlib.suppress(EngineDeadError):
            self.counts = (await engine_client.collective_rpc("recurrence_counts"))[0]

    def collect(self) -> Iterator[Metric]:
        """The metrics, for Prometheus' registry."""
        if not self.counts:
            return
        counter = CounterMetricFamily(
            "loopwise:core_passes", "Passes of the core over all lanes.", labels=["model_name"]
        )
        counter.add_metric([self.model], sum(self.counts["lanes"]))
        yield counter
        about = {
            "decoded_tokens": "Tokens that were generated, and those of the same step behind a stop string.",
            "sequential_passes": "Passes of the core that requests waited for, since their prompts.",
            "core_items": "Positions in these passes.",
        }
        for place, (name, text) in enumerate(about.items()):
            family = CounterMetricFamily(f"loopwise:{name}", text, labels=["model_name", "decoder"])
            for decoder, work in self.counts["decoders"].items():
                family.add_metric([self.model, decoder], work[place])
            yield family
        yield GaugeMetricFamily(
            "loopwise:lane_budget", "Lanes that waves fill a pass up to; 0: no bound.", self.counts["budget"]
        )
        yield self._histogram(
            "loopwise:exit_depth", "Recurrences after which a generated token was read out.", self.counts["exits"], 1
        )
        yield self._histogram("loopwise:lanes_per_tick", "Lanes in a pass of the core.", self.counts["lanes"], 2)
        yield self._histogram("loopwise:coda_batch_size", "Lanes in a pass of the coda.", self.counts["codas"], 2)

    def _histogram(self, name: str, about: str, counts: Sequence[int], growth: int) -> HistogramMetricFamily:
        """A histogram of values n, each seen `counts[n]` times, with buckets at every n, or at powers of `growth` 2."""
        last = len(counts) - 1
        bounds = list(range(1, last + 1)) if growth == 1 else [1 << k for k in range((last - 1).bit_length() + 1)]
        buckets = [(str(float(bound)), float(sum(counts[: bound + 1]))) for bound in bounds]
        family = HistogramMetricFamily(name, about, labels=["model_name"])
        total = float(sum(n * count for n, count in enumerate(counts)))
        family.add_metric([self.model], [*buckets, ("+Inf", float(sum(counts)))], total)
        return family
