"""The vLLM plugin. vLLM calls `register` in every process it starts, before it reads a model's config."""


def register() -> None:
    """Make recurrent-depth checkpoints known to transformers' Auto classes and to vLLM. Safe to call again."""
    from vllm import ModelRegistry

    import loopwise.model  # noqa: F401  registers the config with AutoConfig

    # By name: vLLM imports the class in the process that needs it, never here.
    ModelRegistry.register_model("RecurrentDepthForCausalLM", "loopwise.serve.vllm.model:RecurrentDepthForCausalLM")
