"""What does not fit: refused with a reason, never ignored."""

from __future__ import annotations

from typing import Any

from ...errors import UserError


def check_depth(num_recurrences: int, limit: int) -> None:
    """Raises UserError unless 1 <= num_recurrences <= limit, the model's `max_recurrences`."""
    if not 1 <= num_recurrences <= limit:
        raise UserError(
            f"num_recurrences={num_recurrences}: this model is served at 1 to {limit} recurrences; "
            "for more, say max_recurrences=N to `loopwise serve`, or in its config.json"
        )


def check_model(fields: dict[str, Any], routed: bool = False) -> None:
    """Raises UserError for a recurrent-depth config, its fields given, with a part that serving does not have yet.
    `routed`: routers are had."""
    served = {} if routed else {"router": None}
    served |= {"recurrence_residual": False, "recurrence_encoding": "none", "halting": "none"}
    for name, value in served.items():
        if fields.get(name, value) != value:
            raise UserError(
                f"a model with {name}={fields[name]!r} cannot be served yet; transformers' generate runs it, and "
                "`loopwise export MODEL OUT --unroll R` writes it as a plain model, where its parts allow that"
            )


def check_router(router: dict[str, Any], kv_policy: str | None = None) -> None:
    """Raises UserError for a router, its fields given, that no engine can follow, and for a `kv_policy` beside it."""
    if router.get("inference") == "topk":
        raise UserError(
            "router.inference='topk' takes the best of a whole sequence, which no one who generates it knows: "
            "calibrate the model first (loopwise calibrate)"
        )
    if kv_policy:
        raise UserError(f"kv_policy={kv_policy!r}: a routed model's is its router.kv, {router['kv']!r}")


def check_packed(router: dict[str, Any] | None, source: Any) -> None:
    """Raises UserError for a routed model with a sliding window, whose keys and values are packed."""
    types = getattr(source, "layer_types", None) or ["full_attention"]
    windowed = getattr(source, "sliding_window", None) and (len(types) == 1 or set(types) != {"full_attention"})
    if router and windowed:
        raise UserError("a routed model whose layers have a sliding window cannot be served: use transformers")


def check_vllm_config(config: Any) -> None:
    """The refusals for a VllmConfig: for those who start vLLM themselves, and for what the checkpoint brings along."""
    refuse(
        {
            "pipeline_parallel_size": config.parallel_config.pipeline_parallel_size,
            "enable_lora": config.lora_config is not None,
            "speculative_config": config.speculative_config,
            "quantization": config.model_config.quantization,
            "kv_cache_dtype": config.cache_config.cache_dtype,
            "cpu_offload_gb": config.offload_config.uva.cpu_offload_gb,
            "offload_group_size": config.offload_config.prefetch.offload_group_size,
            "runner": config.model_config.runner_type,
        }
    )


def refuse(flags: dict[str, Any]) -> None:
    """Raises UserError for the first of `flags`, vLLM's settings by name, that does not fit a recurrent-depth model."""
    for name, (accepted, reason) in FLAGS.items():
        value = flags.get(name)
        if value is not None and value not in accepted:
            shown = "" if value is True else f" {value}"
            raise UserError(f"--{name.replace('_', '-')}{shown} does not fit a recurrent-depth model: {reason}")


# vLLM's name of a setting -> (values that work, why no others do). None always works.
FLAGS: dict[str, tuple[tuple, str]] = {
    "pipeline_parallel_size": ((1,), "every recurrence would cross all stages; use --tensor-parallel-size"),
    "enable_lora": ((False,), "an adapter would have to know the depth; merge it into the weights before converting"),
    "speculative_config": ((), "no draft model proposes tokens for it"),
    "speculative_model": ((), "no draft model proposes tokens for it"),
    "quantization": ((), "quantised weights are not checked against the model; serve it in --dtype bfloat16"),
    "kv_cache_dtype": (("auto",), "keys and values have the dtype of the model, which --dtype names"),
    "cpu_offload_gb": ((0,), "offloading replaces the layers that recurrences share"),
    "offload_group_size": ((0,), "offloading replaces the layers that recurrences share"),
    "runner": (("auto", "generate"), "it generates text only"),
    "convert": (("auto", "none"), "it generates text only"),
    "headless": ((False,), "one process serves it"),
    "grpc": ((False,), "it is served over HTTP"),
    "api_server_count": ((1,), "one process serves it"),
    "model_impl": (("auto",), "its layers are vLLM's own"),
}
