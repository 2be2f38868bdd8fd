"""Every route of vLLM's HTTP server in one of four groups: an allow list, for routes of later releases too.

A test builds vLLM's application and walks its routes. One of a new release fails it, until somebody tries the route and
adds it here. Imports nothing heavy.
"""

from __future__ import annotations

from .arguments import UNTRIED, names

COMPLETION = ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest")
CHAT = ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest")

# Routes that generate, and the classes of their bodies. Those at the end have no fields for depth.
GENERATION: dict[str, tuple[tuple[str, str], ...]] = {
    "/v1/completions": (COMPLETION,),
    "/v1/chat/completions": (CHAT,),
    "/v1/chat/completions/batch": (CHAT,),
    "/v1/responses": (("vllm.entrypoints.openai.responses.protocol", "ResponsesRequest"),),
    "/v1/messages": (("vllm.entrypoints.anthropic.protocol", "AnthropicMessagesRequest"),),
    "/invocations": (COMPLETION, CHAT),
    "/inference/v1/generate": (),
    "/generative_scoring": (),
    "/v1/systemone": (),
    "/cohere/v2/chat": (),
}

# Routes that tokenize or render what they are given, at the cost of all that wait for this.
TOKENIZING = names("""
    /tokenize /detokenize /v1/messages/count_tokens
    /v1/chat/completions/render /v1/completions/render /v1/messages/render /v1/responses/render /cohere/v2/chat/render
    /v1/chat/completions/derender /v1/completions/derender
""")

# Other routes that do not run the model, or only read its results.
HARMLESS = names("""
    / /openapi.json /docs /docs/oauth2-redirect /redoc /static /health /ping /load /version /metrics /kv_event_sources
    /v1/models /tokenizer_info
    /v1/responses/{response_id} /v1/responses/{response_id}/cancel /inference/v1/abort_requests /abort_requests
    /server_info /reset_prefix_cache /reset_mm_cache /reset_encoder_cache
    /is_sleeping /is_paused /is_scaling_elastic_ep /weight_info /get_world_size
""")

# Routes answered with 400, by reason. All but the first group exist with VLLM_SERVER_DEV_MODE=1 alone.
REFUSED: dict[str, str] = {
    route: reason
    for reason, routes in {
        "one engine serves it": "/scale_elastic_ep",
        "recorded passes and the states of lanes stay in the memory that it would take away": """
            /sleep /wake_up /release_kv_cache_memory""",
        "weights are loaded once, whole": """
            /init_weight_transfer_engine /shutdown_weight_transfer_engine /start_weight_update
            /start_draft_weight_update /update_weights /finish_weight_update /update_weight_version /weight_checker""",
        UNTRIED: "/collective_rpc /pause /resume",
    }.items()
    for route in sorted(names(routes))
}
