"""Validates every request, over HTTP or from `vllm.LLM`, before the engine gets it.

A value that no lane can have would raise in the engine, and end it with all requests.
"""

from __future__ import annotations

import functools
import inspect
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

from ...trained import beyond_trained
from ..api.fields import FieldError
from ..api.lanes import LaneConfig, is_lanes
from ..api.limits import Limits, limits_of
from ..api.validation import validate_params
from .requests import tokens_of, validate_sampling, validate_tokens

STREAMED = "a prompt that comes in parts (StreamingInput): the lane engine takes whole prompts; send one request each"
PROCESSORS_READ = "logits processors, of --logits-processors or of a plugin, may read earlier tokens, which it guesses"


def has_processors(vllm_config: Any) -> bool:
    """True where vLLM loads logits processors of users: those that are named, and those of installed packages."""
    return bool(vllm_config.model_config.logits_processors or _plugins())


@functools.cache
def _plugins() -> int:
    return len(entry_points(group="vllm.logits_processors"))


def served_limits(vllm_config: Any) -> Limits:
    """The limits of requests in an engine with this VllmConfig, whose model is a recurrent-depth one."""
    config = vllm_config.model_config.hf_config
    if is_lanes(vllm_config):
        limits = limits_of(vars(config), LaneConfig.of(vllm_config))
        if has_processors(vllm_config):
            limits.unfit.setdefault("diffusion", PROCESSORS_READ)
        return replace(limits, max_model_len=vllm_config.model_config.max_model_len)
    return Limits(config.num_recurrences, config.max_recurrences, (), prompt_exit=False, fixed=True)


def validate_request(params: Any, vllm_config: Any, prompt: Any = None) -> None:
    """Raises a ValueError, which vLLM's server answers with 400, for sampling `params` or a `prompt` that are refused.

    prompt: {"prompt_token_ids": ...}; others are not checked. Prints a warning, once, for a depth beyond training.
    """
    config = vllm_config.model_config.hf_config
    try:
        _validate(params, prompt, vllm_config)
    except FieldError as error:
        raise _refused(error) from None
    given = getattr(params, "extra_args", None) or {}
    warn_beyond(config, given.get("num_recurrences", config.num_recurrences))


def _validate(params: Any, prompt: Any, vllm_config: Any) -> None:
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if not isinstance(params, type(_default_params())):
        return  # params of a beam search, whose requests come one by one, or of a type that vLLM refuses
    validate_sampling(params, _default_params())
    validate_tokens({"prompt": ids, **tokens_of(params)}, vllm_config.model_config.hf_config.vocab_size)
    validate_params(params, served_limits(vllm_config))


def _refused(error: FieldError) -> ValueError:
    from vllm.exceptions import VLLMValidationError

    class Refused(VLLMValidationError, ValueError):
        pass

    return Refused(str(error), parameter=error.field)


@functools.cache
def _default_params() -> Any:
    from vllm import SamplingParams

    return SamplingParams()


@functools.cache
def _print_once(line: str) -> None:
    print(f"loopwise: {line}", file=sys.stderr, flush=True)


def warn_beyond(config: Any, depth: int) -> None:
    """Print a warning, once, where the model was not trained at `depth`."""
    if line := beyond_trained(getattr(config, "trained_recurrences", None), [depth]):
        _print_once(line)


def validate_made(request: Any, count: int) -> None:
    """Raises a ValueError where a `request`, as vLLM has made it for its engine, names a token beyond a vocabulary of
    `count`. Stop tokens beyond it, which tokenizer and generation_config.json may name, are removed from it."""
    params = request.sampling_params
    try:
        validate_tokens({"prompt": request.prompt_token_ids, "bad_words": tokens_of(params)["bad_words"]}, count)
    except FieldError as error:
        raise _refused(error) from None
    params.stop_token_ids = [token for token in params.stop_token_ids or () if token < count]
    params._all_stop_token_ids = {token for token in params._all_stop_token_ids if token < count}
    if params._eos_token_id is not None and params._eos_token_id >= count:
        params._eos_token_id = None


@functools.cache
def install_validation() -> None:
    """Wrap vLLM's InputProcessor, so that it validates the requests of recurrent-depth models.

    Logits processors of users are of the kind that vLLM's sampler knows, which is its first runner's, whichever runner
    a configuration is for.
    """
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.sample.logits_processor import validate_logits_processors_parameters

    from ...model import RecurrentDepthConfig

    process, validator = InputProcessor.process_inputs, InputProcessor._build_logits_processors_params_validator
    signature = inspect.signature(process)

    @functools.wraps(process)
    def process_inputs(self, request_id, prompt, params, *args, **kwargs):
        config = self.model_config.hf_config
        if not isinstance(config, RecurrentDepthConfig):
            return process(self, request_id, prompt, params, *args, **kwargs)
        given = signature.bind(self, request_id, prompt, params, *args, **kwargs).arguments
        if given.get("resumable") and is_lanes(self.vllm_config):
            raise _refused(FieldError("prompt", STREAMED))
        validate_request(params, self.vllm_config, prompt)
        request = process(self, request_id, prompt, params, *args, **kwargs)
        validate_made(request, config.vocab_size)
        return request

    @functools.wraps(validator)
    def build_validator(self):
        model = self.model_config
        if not isinstance(model.hf_config, RecurrentDepthConfig) or not is_lanes(self.vllm_config):
            return validator(self)
        return functools.partial(validate_logits_processors_parameters, model.logits_processors)

    InputProcessor.process_inputs = process_inputs
    InputProcessor._build_logits_processors_params_validator = build_validator
