"""What an engine's model offers, and the check of every request against it, over HTTP or from `vllm.LLM`, before the
engine sees it: a value that no lane can have would end the engine, and all others' requests with it."""

from __future__ import annotations

import functools
import sys
from typing import Any

from ...trained import beyond_trained
from ..api.fields import FieldError
from ..api.lanes import LaneConfig, is_lanes
from ..api.limits import Limits, limits_of
from ..api.validation import validate_params
from .requests import check_sampling, check_tokens, tokens_of


def offered(vllm_config: Any) -> Limits:
    """What requests may ask of the recurrent-depth model that an engine of `vllm_config` runs."""
    config = vllm_config.model_config.hf_config
    if is_lanes(vllm_config):
        return limits_of(vars(config), LaneConfig.of(vllm_config))
    return Limits(config.num_recurrences, config.max_recurrences, (), prompt_exit=False, fixed=True)


def check_request(params: Any, vllm_config: Any, prompt: Any = None) -> None:
    """Raises a ValueError, which vLLM's server answers with 400, where sampling `params`, or a `prompt` of token ids
    ({"prompt_token_ids": ...}), want what cannot be had."""
    config = vllm_config.model_config.hf_config
    try:
        _check(params, prompt, vllm_config)
    except FieldError as error:
        raise _refused(error) from None
    given = getattr(params, "extra_args", None) or {}
    warn_beyond(config, given.get("num_recurrences", config.num_recurrences))


def _check(params: Any, prompt: Any, vllm_config: Any) -> None:
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if not isinstance(params, type(_usual())):
        return  # a beam search's, whose requests come one by one, or what vLLM refuses
    check_sampling(params, _usual())
    check_tokens({"prompt": ids, **tokens_of(params)}, vllm_config.model_config.hf_config.vocab_size)
    validate_params(params, offered(vllm_config))


def _refused(error: FieldError) -> ValueError:
    from vllm.exceptions import VLLMValidationError

    class Refused(VLLMValidationError, ValueError):
        pass

    return Refused(str(error), parameter=error.field)


@functools.cache
def _usual() -> Any:
    from vllm import SamplingParams

    return SamplingParams()


@functools.cache
def _said(line: str) -> None:
    print(f"loopwise: {line}", file=sys.stderr, flush=True)


def warn_beyond(config: Any, depth: int) -> None:
    """Say once that the model was not trained at `depth`."""
    if line := beyond_trained(getattr(config, "trained_recurrences", None), [depth]):
        _said(line)


def check_made(request: Any, count: int) -> None:
    """Raises a ValueError where a `request` that vLLM has made for its engine names a token beyond a vocabulary of
    `count`; tokens that end a text, which the tokenizer and generation_config.json name, too, are taken off."""
    params = request.sampling_params
    try:
        check_tokens({"prompt": request.prompt_token_ids, "bad_words": tokens_of(params)["bad_words"]}, count)
    except FieldError as error:
        raise _refused(error) from None
    params.stop_token_ids = [token for token in params.stop_token_ids or () if token < count]
    params._all_stop_token_ids = {token for token in params._all_stop_token_ids if token < count}
    if params._eos_token_id is not None and params._eos_token_id >= count:
        params._eos_token_id = None


@functools.cache
def check_requests() -> None:
    """Let vLLM check the requests of recurrent-depth models where it checks all else about them."""
    from vllm.v1.engine.input_processor import InputProcessor

    from ...model import RecurrentDepthConfig

    process = InputProcessor.process_inputs

    @functools.wraps(process)
    def process_inputs(self, request_id, prompt, params, *args, **kwargs):
        config = self.model_config.hf_config
        if not isinstance(config, RecurrentDepthConfig):
            return process(self, request_id, prompt, params, *args, **kwargs)
        check_request(params, self.vllm_config, prompt)
        request = process(self, request_id, prompt, params, *args, **kwargs)
        check_made(request, config.vocab_size)
        return request

    InputProcessor.process_inputs = process_inputs
