"""Keys of `loopwise serve`. Everything else about the server is a vLLM flag."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ..exit_rules import CHOICES
from ..recipe import Count, Integer, Number, Section
from .api.lanes import read_auto


class ServeRecipe(Section):
    """Keys of a serving recipe."""

    engine: Literal["lanes", "fixed"] | None = Field(
        None,
        description="lanes: requests at their own depths share every pass of the core; fixed: all run at one depth; "
        "default lanes, where the model allows it",
    )
    num_recurrences: Count | None = Field(None, description="depth of a request that names none; default the model's")
    max_recurrences: Count | None = Field(
        None, description="greatest depth of a request, for which the cache has room; default the model's"
    )
    exit_rule: str | None = Field(
        None, description=f"exit rule of a request that names none: {CHOICES}; default the model's"
    )
    exit_threshold: Number | None = Field(None, description="its threshold; default the rule's")
    min_recurrences: Count | None = Field(None, description="recurrences before it may fire; default the model's")
    kv_policy: str | None = Field(
        None, description="keys and values of deeper recurrences after an exit; default the model's"
    )
    passes_per_step: Count = Field(16, description="passes of the core in one step of the engine")
    decoder: Literal["plain", "wave", "diffusion"] = Field(
        "plain", description="decoder of a request that names none; wave: several tokens in flight, the same text"
    )
    max_in_flight: Count | None = Field(
        8, description="most tokens of a request in flight, in a wave or a diffusion; auto: as many as a wave can use"
    )
    draft_every: Count | Literal["auto"] | None = Field(
        None,
        description="recurrences between two read-outs of a wave's token, for requests that name none; auto: by "
        "measured acceptance and load; default 1",
    )
    draft_depths: list[Count] | None = Field(
        None, description="depths at which a wave's token is read out, in place of draft_every"
    )
    max_lanes: Integer = Field(
        0, ge=0, description="most lanes of a pass beside prompts'; more requests take turns; 0 for no bound"
    )
    budget: Integer | None = Field(
        None,
        ge=0,
        description="lanes of a pass that waves may fill; 0 for no bound; default auto: measured at start-up",
    )
    coda_wait: Integer | None = Field(
        None,
        ge=0,
        description="passes that an exit waits for others to be read out with; default auto: as many as pay off at the "
        "load",
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: Integer = Field(8000, ge=1, le=65535, description="port to listen on")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights and cache; auto: the checkpoint's, but bfloat16 for float32"
    )
    name: str | None = Field(None, description="model name in the API; default the directory's name, or the hub id")
    revision: str | None = Field(None, description="branch, tag or commit of MODEL when it is a hub id")
    max_body_mib: Count = Field(8, description="MiB of a request's body; a larger one is answered with 413")
    body_seconds: Count = Field(60, description="time in which a body has to arrive; a slower one gets 408")
    max_choices: Count = Field(128, description="choices of one request: n x prompts")
    max_queue: Integer = Field(
        1024, ge=0, description="choices that may wait beside the --max-num-seqs that run; a request beyond gets 429"
    )
    open_metrics: bool = Field(False, description="with VLLM_API_KEY set, /metrics needs no key")
    hang_seconds: Integer = Field(
        300,
        ge=0,
        description="time without a sign of life of the engine, which it gives between two steps, after which the "
        "server ends with exit status 1; 0: never",
    )
    drain_seconds: Integer = Field(30, ge=0, description="time that open requests get after SIGTERM or Ctrl-C")

    @field_validator("max_in_flight", mode="before", json_schema_input_type=Count | Literal["auto", -1])
    @classmethod
    def _auto_width(cls, value: object) -> object:
        return read_auto(value)

    @field_validator("budget", "coda_wait", mode="before", json_schema_input_type=Count | Literal["auto", 0, -1] | None)
    @classmethod
    def _auto(cls, value: object) -> object:
        return read_auto(value)
