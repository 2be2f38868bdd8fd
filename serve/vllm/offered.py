"""What an engine's model offers, and the check of every request against it, over HTTP or from `vllm.LLM`, before the
engine sees it: a value that no lane can have would end the engine, and all others' requests with it."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from .fields import FieldError, Limits, check_params
from .lanes import LaneConfig, is_lanes


def limits_of(config: dict[str, Any], lanes: LaneConfig) -> Limits:
    """What requests may ask of a model with these fields in the lane engine."""
    from ..engine.admission import prompt_rules, unfit
    from ..engine.exits import NAMES
    from ..engine.kv import policy_of

    rules = tuple(name for name in NAMES if config["exit_gate"] or name != "gate")
    here = SimpleNamespace(**config)
    policy = policy_of(here)
    return Limits(
        config["num_recurrences"],
        config["max_recurrences"],
        rules[:1] if config["router"] else rules,
        prompt_exit=config["kv_policy"] != "per-depth",
        rule=(config["exit"] or {}).get("rule", "fixed"),
        decoder=lanes.decoder,
        wave=lanes.wave,
        unfit=unfit(policy, here),
        routed=bool(config["router"]),
        prompt_rules=tuple(name for name in prompt_rules(policy, here) if name in rules),
    )


def offered(vllm_config: Any) -> Limits:
    """What requests may ask of the recurrent-depth model that an engine of `vllm_config` runs."""
    config = vllm_config.model_config.hf_config
    if is_lanes(vllm_config):
        return limits_of(vars(config), LaneConfig.of(vllm_config))
    return Limits(config.num_recurrences, config.max_recurrences, (), prompt_exit=False, fixed=True)


def check_request(params: Any, vllm_config: Any) -> None:
    """Raises a ValueError, which vLLM's server answers with 400, where sampling `params` want what cannot be had."""
    try:
        check_params(params, offered(vllm_config))
    except FieldError as error:
        from vllm.exceptions import VLLMValidationError

        class Refused(VLLMValidationError, ValueError):
            pass

        raise Refused(str(error), parameter=error.field) from None


@functools.cache
def check_requests() -> None:
    """Let vLLM check the requests of recurrent-depth models where it checks all else about them."""
    from vllm.v1.engine.input_processor import InputProcessor

    from ...model import RecurrentDepthConfig

    process = InputProcessor.process_inputs

    @functools.wraps(process)
    def process_inputs(self, request_id, prompt, params, *args, **kwargs):
        if isinstance(self.model_config.hf_config, RecurrentDepthConfig):
            check_request(params, self.vllm_config)
        return process(self, request_id, prompt, params, *args, **kwargs)

    InputProcessor.process_inputs = process_inputs
