"""Every argument of vLLM's server in one of four groups: an allow list, for arguments of later releases too.

Names are those of vLLM's parser; `config.field` is one field of an argument that is a whole config. An argument in no
group is refused where it is set, until somebody tries it and adds it here. A test walks them. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ...errors import UserError


def names(text: str) -> frozenset[str]:
    """The names in a `text`."""
    return frozenset(text.split())


# Arguments whose fields each have a group; the others are classified as a whole.
NESTED = ("attention_config", "structured_outputs_config")

# Passed on: they reach the engine, and tests serve with them, in both engines.
PASSED = names("""
    model model_tag config served_model_name dtype seed tokenizer tokenizer_mode tokenizer_revision trust_remote_code
    skip_tokenizer_init tokens_only max_model_len enforce_eager max_logprobs logprobs_mode logits_processors
    generation_config override_generation_config hf_overrides
    tensor_parallel_size distributed_executor_backend load_format runner convert model_impl kv_cache_dtype
    block_size gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override
    enable_prefix_caching prefix_caching_hash_algo enable_chunked_prefill
    max_num_batched_tokens max_num_seqs max_num_active_seqs max_num_queued_reqs max_num_queued_tokens
    long_prefill_token_threshold long_prefill_token_threshold_adaptive scheduling_policy scheduler_reserve_full_isl
    scheduler_cls worker_cls async_scheduling additional_config stream_interval
    attention_backend attention_config.backend
    reasoning_parser reasoning_parser_plugin structured_outputs_config.backend
    structured_outputs_config.disable_any_whitespace structured_outputs_config.disable_additional_properties
    structured_outputs_config.reasoning_parser structured_outputs_config.reasoning_parser_plugin
    structured_outputs_config.enable_in_reasoning
""")

# Passed on to the fixed engine, which is vLLM's own; refused in the lane engine.
COMPILES = "the lane engine compiles and records its own passes ('-- --enforce-eager' does without)"
FIXED = dict.fromkeys(
    ["compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size", "optimization_level"], COMPILES
)

# Harmless: they do not change what the engine computes. Each group has its reason.
HARMLESS: dict[str, frozenset[str]] = {
    "the HTTP server's: where it listens, who may ask, what a reply looks like": names("""
        help host port uds shutdown_timeout api_key root_path middleware allow_credentials allowed_origins
        allowed_methods allowed_headers ssl_keyfile ssl_certfile ssl_ca_certs enable_ssl_refresh ssl_cert_reqs
        ssl_ciphers h11_max_incomplete_event_size h11_max_header_count disable_fastapi_docs enable_offline_docs
        enable_request_id_headers sse_keep_alive_interval enable_server_load_tracking enable_force_include_usage
        enable_prompt_tokens_details return_tokens_as_token_ids fingerprint_mode fingerprint_value
        enable_tokenizer_info_endpoint enable_scale_out renderer_num_workers grpc_port
    """),
    "chats and tools: templates in, parsers out; the engine sees token ids": names("""
        chat_template chat_template_content_format trust_request_chat_template default_chat_template_kwargs
        response_role enable_auto_tool_choice exclude_tools_when_tool_choice_none tool_call_parser tool_parser_plugin
        tool_strict_level tool_server reasoning_effort_map cohere_is_reasoning_model cohere_format
        anthropic_disabled_thinking_effort
    """),
    "logs and counters: they read what the engine reports": names("""
        disable_log_stats enable_log_requests enable_log_outputs enable_log_deltas enable_per_request_metrics
        max_log_len log_error_stack logging_config log_level log_config_file uvicorn_log_level
        disable_uvicorn_access_log disable_access_log_for_endpoints show_hidden_metrics_for_version
        otlp_traces_endpoint custom_histogram_buckets kv_cache_metrics kv_cache_metrics_sample
        enable_logging_iteration_details jit_monitor_mode jit_monitor_verbose fail_on_environ_validation
        watchdog_config
    """),
    "how weight files are read, whose tensors are checked afterwards": names("""
        download_dir hf_token safetensors_load_strategy safetensors_prefetch_num_threads
        safetensors_prefetch_block_size ignore_patterns use_tqdm_on_load pt_load_map_location
        max_parallel_loading_workers
    """),
    "where processes run, and how long they wait for each other": names("""
        device_ids numa_bind numa_bind_nodes numa_bind_cpus distributed_timeout_seconds
        cpu_distributed_timeout_seconds disable_custom_all_reduce disable_cascade_attn
    """),
}

# Refused where they differ from vLLM's default. Each group has its reason.
UNTRIED = "nobody has compared it with transformers yet"
REFUSED: dict[str, frozenset[str]] = {
    "every recurrence would cross all stages; use --tensor-parallel-size": names("pipeline_parallel_size"),
    "an adapter would have to know the depth; merge it into the weights before converting": names("""
        enable_lora lora_modules max_loras max_lora_rank lora_dtype enable_tower_connector_lora max_cpu_loras
        fully_sharded_loras lora_target_modules default_mm_loras specialize_active_lora enable_mixed_moe_lora_format
        enable_moe_shared_loras max_lora_cls_labels
    """),
    "no draft model proposes tokens for it": names("""
        speculative_config speculative_model spec_method spec_model spec_tokens per_request_spec_decode_metrics
    """),
    "quantised weights are not checked against the model; serve it in --dtype bfloat16": names("""
        quantization quantization_config allow_deprecated_quantization
    """),
    "keys and values have the dtype of the model, which --dtype names": names("kv_cache_dtype_skip_layers"),
    "offloading replaces the layers that recurrences share": names("""
        offload_backend cpu_offload_gb cpu_offload_params offload_group_size offload_num_in_group
        offload_prefetch_step offload_params
    """),
    "no connector moves the keys and values of every depth": names("""
        kv_transfer_config kv_offloading_size kv_offloading_backend kv_events_config ec_transfer_config
        ec_manager_config
    """),
    "the depths of tokens travel in the field that it fills": names("""
        enable_return_routed_experts aux_output_config
    """),
    "the keys and values of a position, at every depth, are not cut among ranks": names("""
        decode_context_parallel_size prefill_context_parallel_size dcp_comm_backend dcp_q_replicate
        dcp_kv_cache_interleave_size cp_kv_cache_interleave_size
    """),
    "a pass of the core is not cut into micro-batches": names("""
        enable_dbo ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold
    """),
    "a watermark is made by vLLM's second model runner, which does not run it": names("watermark_config"),
    "a prompt is token ids": names("enable_prompt_embeds"),
    "recorded passes and the states of lanes stay in the memory that it would take away": names("""
        enable_sleep_mode sleep_mode_backend sleep_mode_offload_cudagraph sleep_preserve_parameter_names
        enable_cumem_allocator enable_nccl_comm_suspend
    """),
    "weights are loaded once, whole": names("weight_transfer_config"),
    "one engine serves it, which nobody has tried with others yet; start servers behind a balancer": names("""
        data_parallel_size data_parallel_rank data_parallel_start_rank data_parallel_size_local data_parallel_address
        data_parallel_rpc_port data_parallel_backend data_parallel_hybrid_lb data_parallel_external_lb
        data_parallel_multi_port_external_lb data_parallel_supervisor_port dp_supervisor_probe_interval_s
        dp_supervisor_probe_timeout_s dp_supervisor_probe_failure_threshold dp_sync_interval prefill_schedule_interval
        disable_nccl_for_dp_synchronization enable_fault_tolerance fault_tolerance_config aggregate_engine_logging
    """),
    "no mixture of experts is served": names("""
        enable_expert_parallel enable_ep_weight_filter all2all_backend enable_eplb eplb_config
        expert_placement_strategy enable_elastic_ep elastic_ep_max_dp_size moe_backend
    """),
    "one process on one machine serves it": names("""
        headless api_server_count master_addr master_port nnodes node_rank ray_workers_use_nsight
    """),
    "it is served over HTTP": names("grpc"),
    "it generates text only": names("pooler_config io_processor_plugin enable_flash_late_interaction"),
    "it reads text only": names("""
        trust_request_mm_kwargs allowed_local_media_path allowed_media_domains language_model_only limit_mm_per_prompt
        enable_mm_embeds media_io_kwargs mm_processor_kwargs mm_processor_cache_gb mm_processor_cache_type
        mm_hasher_algorithm mm_shm_cache_max_object_size_mb mm_encoder_only mm_encoder_tp_mode mm_encoder_attn_backend
        mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path
        mm_encoder_fp8_scale_save_margin interleave_mm_strings skip_mm_profiling video_pruning_rate
        video_pruning_method mm_tensor_ipc mm_processor_device mm_ipc_gpu_memory_gb mm_device_do_normalize
        disable_chunked_mm_input enable_shm_tensor_arena
    """),
    "it has no state-space layers": names("""
        mamba_backend mamba_ssu_algorithm enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds
        mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size mamba_cache_mode
        enable_mamba_shared_prefix_checkpoint replayssm_buffer_len use_replayssm gdn_prefill_backend
        kda_prefill_backend kda_decode_backend engram_config prefix_cache_retention_interval swa_bounded_replay
        kv_sharing_fast_prefill
    """),
    "MODEL is a directory, whose config.json and weights are checked before the start": names("""
        hf_config_path config_format revision code_revision model_class_overrides model_loader_extra_config
    """),
    "a budget of thoughts is counted once a step, which may give several tokens": names("reasoning_config"),
    "the decoder is a request's: decoder=diffusion": names("diffusion_config"),
    "it counts one pass of every layer": names("enable_mfu_metrics enable_layerwise_nvtx_tracing"),
    UNTRIED: names("""
        watermark max_num_scheduled_tokens disable_sliding_window return_sampling_mask use_fp64_gumbel
        enable_trace_replay enable_hc_sp
        enable_batch_sharded_sampling prefix_match_unit disable_hybrid_kv_cache_manager worker_extension_cls
        collect_detailed_traces cudagraph_metrics profiler_config performance_mode kernel_config ir_op_priority
        enable_flashinfer_autotune linear_backend sparse_indexer_topk_backend monokernel
        attention_config.minimax_m3_msa_decode_backend attention_config.backend_per_kind
        attention_config.flash_attn_version attention_config.flash_attn_max_num_splits_for_cuda_graph
        attention_config.tokenspeed_mla_min_split_kv attention_config.tq_max_kv_splits_for_cuda_graph
        attention_config.use_trtllm_attention attention_config.disable_flashinfer_q_quantization
        attention_config.mla_prefill_backend attention_config.use_prefill_query_quantization
        attention_config.indexer_kv_dtype attention_config.indexer_sparse_logits attention_config.hisparse_config
        attention_config.use_non_causal attention_config.sparse_mla_force_mqa
        attention_config.sparse_mla_prefill_workspace_factor attention_config.flex_attn_block_m
        attention_config.flex_attn_block_n attention_config.flex_attn_q_block_size
        attention_config.flex_attn_kv_block_size attention_config.indexer_tp_shard_min_rows
        attention_config.minimax_m3_indexer_cp attention_config.trtllm_ragged_backend
    """),
}
REASONS = {name: reason for reason, group in REFUSED.items() for name in sorted(group)}

# The lane engine's classes, by which vLLM's configuration names them.
WORKER = "loopwise.serve.vllm.worker.LaneWorker"
SCHEDULER = "loopwise.serve.vllm.scheduler.LaneScheduler"
# Arguments that work at some values alone: name -> (these values, why no others). None always works.
VALUES: dict[str, tuple[tuple, str]] = {
    "runner": (("auto", "generate"), "it generates text only"),
    "convert": (("auto", "none"), "it generates text only"),
    "model_impl": (("auto",), "its layers are vLLM's own"),
    "kv_cache_dtype": (("auto",), "keys and values have the dtype of the model, which --dtype names"),
    "load_format": (("auto", "hf", "safetensors"), "its weights are in safetensors files, which are checked"),
    "distributed_executor_backend": (("mp", "uni"), "one process on one machine serves it"),
    "tokenizer_mode": (("auto", "hf", "slow"), "its tokenizer is a Hugging Face one"),
    "worker_cls": (("auto", WORKER), "the worker is Loopwise's or vLLM's own"),
    "scheduler_cls": ((SCHEDULER,), "the scheduler is Loopwise's or vLLM's own"),
    "api_server_count": ((1,), "one process serves it"),
}

IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"  # 0: the engine runs in the process that asks
# Environment variables of vLLM that change what the engine does: (values that work, why no others do).
ENVIRONMENT: dict[str, tuple[tuple, str]] = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": (("0", "false", "False"), "an adapter would have to know the depth"),
    "VLLM_BATCH_INVARIANT": (("0",), UNTRIED),
    "VLLM_DP_SIZE": (("1",), "one engine serves it"),
    "VLLM_ENABLE_RESPONSES_API_STORE": (("0",), "replies that it keeps would fill the memory, uncounted by max_queue"),
    IN_PROCESS: (("1",), "the server and its engine are processes of their own"),
    "VLLM_PP_LAYER_PARTITION": ((), "every recurrence would cross all stages"),
    "VLLM_TEST_FORCE_LOAD_FORMAT": ((), "its weights are in safetensors files, which are checked"),
    "VLLM_USE_RUST_FRONTEND": (("0",), "the fields of requests are checked in vLLM's Python server"),
    "VLLM_USE_SIMPLE_KV_OFFLOAD": (("0",), "no connector moves the keys and values of every depth"),
}

# Fields of a VllmConfig: argument -> (path of its value, the value that turns it off).
CONFIG: dict[str, tuple[str, Any]] = {
    **{
        name: (f"parallel_config.{name}", 1)
        for name in (
            "pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size",
            "prefill_context_parallel_size", "nnodes",
        )
    },
    **{name: (f"parallel_config.{name}", False) for name in ("enable_expert_parallel", "enable_dbo")},
    "ubatch_size": ("parallel_config.ubatch_size", 0),
    "api_server_count": ("parallel_config._api_process_count", 1),
    **{
        name: (f"model_config.{name}", False)
        for name in (
            "enable_prompt_embeds", "enable_sleep_mode", "enable_trace_replay", "return_sampling_mask",
        )
    },
    **{
        name: (name, None)
        for name in (
            "speculative_config", "kv_transfer_config", "kv_events_config", "ec_transfer_config",
            "weight_transfer_config", "watermark_config", "diffusion_config",
        )
    },
    "enable_return_routed_experts": ("aux_output_config.enable_return_routed_experts", False),
    "enable_lora": ("lora_config", None),
    "quantization": ("model_config.quantization", None),
    "runner": ("model_config.runner_type", "generate"),
    "kv_cache_dtype": ("cache_config.cache_dtype", "auto"),
    "kv_offloading_size": ("cache_config.kv_offloading_size", None),
    "kv_sharing_fast_prefill": ("cache_config.kv_sharing_fast_prefill", False),
    "watermark": ("scheduler_config.watermark", 0),
    "cpu_offload_gb": ("offload_config.uva.cpu_offload_gb", 0),
    "offload_group_size": ("offload_config.prefetch.offload_group_size", 0),
}  # fmt: skip


def group_of(name: str, lanes: bool) -> str | None:
    """The group of argument `name`: `passed`, `harmless` or `refused`; None for an unknown one.

    lanes: in the lane engine, otherwise in the fixed one.
    """
    if name in PASSED or name in FIXED:
        return "refused" if lanes and name in FIXED else "passed"
    if any(name in group for group in HARMLESS.values()):
        return "harmless"
    return "refused" if name in REASONS else None


def parts(name: str, value: Any) -> dict[str, Any]:
    """The `value` of argument `name` by the names in the groups: its fields, where they have groups of their own."""
    if name not in NESTED or not dataclasses.is_dataclass(value):
        return {name: value}
    return {f"{name}.{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}


def check_arguments(values: dict[str, Any], defaults: dict[str, Any], lanes: bool) -> None:
    """Raises UserError for the first of vLLM's `values`, by argument, that differs from its default and is refused.

    defaults: vLLM's; a name that it lacks has no default. False is the same as a default of None.
    """
    for argument, whole in values.items():
        default = parts(argument, defaults.get(argument))
        for name, value in parts(argument, whole).items():
            if value is None or value == default.get(name) or (value is False and default.get(name) is None):
                continue
            check_value(name, value, lanes)


def check_value(name: str, value: Any, lanes: bool) -> None:
    """Raises UserError where argument `name` cannot have this `value`, which is not vLLM's default."""
    accepted, why = VALUES.get(name, ((), ""))
    group = group_of(name, lanes)
    if value in accepted or (not why and group in ("passed", "harmless")):
        return
    why = why or REASONS.get(name) or FIXED.get(name) or "it is not known to work with Loopwise yet"
    raise UserError(f"{flag(name, value)} does not fit a recurrent-depth model: {why}")


def check_environment(environment: Any, server: bool = True) -> None:
    """Raises UserError for an environment variable of vLLM with a value that a recurrent-depth model cannot have.

    server: of an HTTP server; `vllm.LLM` may have its engine in its own process.
    """
    for name, (accepted, why) in ENVIRONMENT.items():
        if name == IN_PROCESS and not server:
            continue
        if (value := environment.get(name)) and value not in accepted:
            raise UserError(f"{name}={value} does not fit a recurrent-depth model: {why}")
    plugins = environment.get("VLLM_PLUGINS")
    if plugins is not None and "loopwise" not in plugins.split(","):
        raise UserError(f"VLLM_PLUGINS={plugins}: without loopwise among them, vLLM does not know the model")


def refuse(flags: dict[str, Any]) -> None:
    """Raises UserError for the first of `flags`, vLLM's arguments by name, that is refused; None counts as not set."""
    for name, value in flags.items():
        if value is not None:
            check_value(name, value, lanes=True)


def check_vllm_config(config: Any, lanes: bool) -> None:
    """Raises UserError for a refused value in a VllmConfig: started without `loopwise serve`, or from a checkpoint."""
    for name, (path, default) in CONFIG.items():
        value = config
        for part in path.split("."):
            value = getattr(value, part, None)  # a release may lack it
        if value is not None and value != default:
            check_value(name, value, lanes)


def flag(name: str, value: Any) -> str:
    """Argument `name` with its `value`, as on a command line."""
    shown = "" if value is True else f" {value}" if isinstance(value, str | int | float) else ""
    flag = "--" + name.replace("_", "-")
    return f"--no-{flag.removeprefix('--')}" if value is False else flag + shown
