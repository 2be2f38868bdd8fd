"""The vLLM plugin. vLLM calls `register` in every process it starts, before it reads a model's config."""

import os

SERVER = "LOOPWISE_SERVER"  # environment variable: process id of the `loopwise serve` that vLLM's processes belong to


def register() -> None:
    """Make recurrent-depth checkpoints known to transformers' Auto classes and to vLLM. Safe to call again."""
    from vllm import ModelRegistry

    import loopwise.model  # noqa: F401  registers the config with AutoConfig

    from .offered import check_requests

    check_requests()

    # By name: vLLM imports the class in the process that needs it, never here.
    ModelRegistry.register_model("RecurrentDepthForCausalLM", "loopwise.serve.vllm.model:RecurrentDepthForCausalLM")
    ModelRegistry.register_model("LoopwiseSandwichForCausalLM", "loopwise.serve.vllm.sandwich:SandwichForCausalLM")
    if os.environ.get(SERVER) == str(os.getppid()):
        _stop_with_server()


def _stop_with_server() -> None:
    """Let the server alone tell vLLM's engine process when to stop, and let the engine not outlive it.

    Ctrl-C in a terminal reaches a whole process group, and vLLM's workers end on it at once: open requests would fail
    instead of draining. Nor does the engine notice that a server was killed. Its workers notice that the engine ended.
    """
    import ctypes
    import signal
    import sys

    os.setpgid(0, 0)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
