"""The vLLM plugin. vLLM calls `register` in every process it starts, before it reads a model's config.

The only package that imports vLLM, and this file imports nothing until `register` is called. In reading order:

    arguments.py         every argument of vLLM's server: passed on, harmless or refused
    argument_errors.py   wrong values of arguments, in one line with flag and rule
    exposure.py          who can reach the server, and who may ask it
    routes.py            every route of vLLM's HTTP server, in four groups
    requests.py          every field of vLLM's requests, and checks of their values
    validation.py        every request, validated before the engine gets it
    layers.py            vLLM's decoder layers: how one is called, and copies with a KV cache of their own
    lora.py              LoRA and DoRA by depth on vLLM's linear modules
    relaxation.py        the tensors that a layer has for every depth
    fixed/               the fixed engine: all requests at one depth
    parts.py             the lane engine's view of vLLM's model, in pieces
    sandwich.py          the sandwich architecture (Huginn, Ouro) on vLLM's Llama
    ungated.py           the ungated architecture (Parcae, LoopFormer) on vLLM's Llama
    model.py             RecurrentDepthForCausalLM, for both engines
    attention.py         attention of lanes on vLLM's paged KV cache, by vLLM's backends
    cpu_attention.py     the same by vLLM's CPU operations
    triton_attention.py  the same by the engine's Triton kernels
    rotary.py            rotary position embedding, from layers to those kernels
    held.py              the requests that vLLM has scheduled and not finished
    processors.py        vLLM's logits processors, for the requests of one call
    metadata.py          vLLM's description of how requests sample
    sampling.py          vLLM's sampler, for lanes
    grammar.py           masks of grammars
    prompt_logprobs.py   log-probabilities of prompt tokens
    output.py            the output of a step of lanes
    arrivals.py          ends a running step early when a new request is waiting
    scheduler.py         vLLM's scheduler, for steps that give a request several tokens
    steps.py             a step of vLLM as a step of the engine's loop
    kv_cache.py          vLLM's KV cache for lanes
    profiling.py         the memory of the largest pass
    runner.py            the model runner: what vLLM's workers call
    worker.py            vLLM's workers with this runner
    announce.py          lines printed before the engine starts, and at the server's end
    trusted.py           code of a checkpoint: named where it runs, kept from running elsewhere
    startup.py           checks of memory, block size, cores and tokenizer before the engine starts
    configure.py         the engine of a model, and its settings, in vLLM's configuration
    load.py              how much requests may ask for
    watchdog.py          a hanging engine ends the server
    slow_clients.py      connections of clients that do not read are closed
    shutdown.py          open requests are drained, then aborted
    metrics.py           Prometheus metrics of the lane engine
    work.py              recurrences of a request, from vLLM's outputs to its reply
    page/                the page /depth, and the settings that it offers
    guard.py             the outermost middleware: keys, sizes of bodies
    template_process.py  a process that renders chat templates
    templates.py         chat templates rendered there, bounded in time and memory
    http.py              depth fields in HTTP requests, recurrences in their replies
    endpoint.py          the plugin of vLLM's HTTP server: these middlewares, the page, metrics and the server's end
    launch.py            vLLM's server: its arguments, its start and its end
    lanes.py             the old place of LaneConfig
"""

from typing import Any


def register() -> None:
    """Register recurrent-depth models with transformers' Auto classes and with vLLM. Safe to call again.

    Also makes vLLM choose the engine of such models and validate their requests, and in a child of `loopwise serve`
    lets this process end with it.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import loopwise.model  # noqa: F401  registers the config with AutoConfig

    from ...process import stop_with_server
    from .configure import Hook
    from .validation import install_validation

    install_validation()
    hooks: dict[str, Any] = MODELS_CONFIG_MAP
    hooks["RecurrentDepthForCausalLM"] = Hook

    # By name: vLLM imports the class in the process that needs it, never here.
    ModelRegistry.register_model("RecurrentDepthForCausalLM", "loopwise.serve.vllm.model:RecurrentDepthForCausalLM")
    ModelRegistry.register_model("LoopwiseSandwichForCausalLM", "loopwise.serve.vllm.sandwich:SandwichForCausalLM")
    ModelRegistry.register_model("LoopwiseUngatedForCausalLM", "loopwise.serve.vllm.ungated:UngatedForCausalLM")
    stop_with_server()
