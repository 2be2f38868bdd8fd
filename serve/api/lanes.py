"""Settings of the lane engine inside vLLM. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ...deprecated import SERVING, accept_old_names
from .decoders import Decoder, auto_width, decoder_of

LANES = "loopwise_lanes"  # key in vLLM's additional_config: the lane engine's settings, complete
SETTINGS = "loopwise"  # key in vLLM's additional_config: the user's settings, keys of `loopwise serve`
AUTO = None  # coda_wait, budget: measured at start-up; max_in_flight: by depth and drafts


def read_auto(value: Any) -> Any:
    """The `value` of a setting; AUTO where it is "auto" or -1, which users write."""
    return AUTO if value == "auto" or (type(value) is int and value == -1) else value


@accept_old_names(SERVING)
@dataclass(frozen=True)
class LaneConfig:
    """Settings of the lane engine.

    passes_per_step: passes of the core in one step of vLLM's engine.
    max_lanes: most lanes of a pass beside prompts'; 0 for no bound.
    coda_wait: passes that an exit waits for others to be read out with; AUTO: as many as pay off at the load.
    decoder: the decoder of requests that name none.
    max_in_flight: most positions of one request in flight; AUTO: as many as a wave can use.
    draft_every, draft_depths: the depths at which a wave drafts, for requests that name none (AUTO or 0: by measured
    acceptance and load); the second counts where it is not empty.
    budget: lanes of a pass that waves may fill; 0 for no bound; AUTO: as many as add little time.
    compile: compile passes of the core.
    graphs: on a GPU, run ticks as CUDA graphs, with the engine's own attention kernels.
    report: every output has the depths of its tokens (`routed_experts`); otherwise those of requests with
    `return_recurrences`.
    """

    passes_per_step: int = 16
    max_lanes: int = 0
    coda_wait: int | None = 0
    decoder: str = "plain"
    max_in_flight: int = 8
    budget: int | None = 0
    compile: bool = True
    graphs: bool = True
    report: bool = True
    draft_every: int = 1
    draft_depths: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("coda_wait", "budget", "max_in_flight"):
            object.__setattr__(self, name, read_auto(getattr(self, name)))
        object.__setattr__(self, "draft_every", read_auto(self.draft_every) or 0)
        object.__setattr__(self, "draft_depths", tuple(self.draft_depths))  # a list, where it comes from JSON

    @classmethod
    def of(cls, vllm_config: Any) -> LaneConfig:
        """The settings in a VllmConfig. Raises KeyError for one of the fixed engine."""
        lanes = cls(**vllm_config.additional_config[LANES])
        return lanes.at(vllm_config.model_config.hf_config.max_recurrences) if lanes.max_in_flight is AUTO else lanes

    def at(self, max_recurrences: int) -> LaneConfig:
        """These settings with `max_in_flight` for requests of up to `max_recurrences`."""
        return replace(self, max_in_flight=auto_width(max_recurrences, self.draft_every, self.draft_depths))

    def decoder_of(self, params: Any, logprobs_mode: str) -> Decoder:
        """The decoder of a request with vLLM's sampling `params`, as `decoders.decoder_of` says."""
        return decoder_of(params, self.decoder, self.max_in_flight, self.draft_every, self.draft_depths, logprobs_mode)

    def flags(self) -> dict[str, Any]:
        """Arguments of vLLM for these settings: `vllm.LLM(model, **LaneConfig().flags())`."""
        return {"additional_config": {LANES: asdict(self)}}


def is_lanes(vllm_config: Any) -> bool:
    """True for a VllmConfig with the lane engine, False with the fixed one."""
    return LANES in (vllm_config.additional_config or {})
