"""Models whose weights are read when a module runs and dropped after it: one module is in memory, never the model."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype

from .double import Double

Read = Callable[[str], torch.Tensor]  # a tensor by its name in the model


def streamed(make: Callable[[], PreTrainedModel], read: Read, dtype: torch.dtype) -> PreTrainedModel:
    """The model that `make()` builds, in eval mode and `dtype`; `read(name)` gives its weights, module by module.

    Buffers are in memory: computed ones (rotary tables) are computed, stored ones are read at once. In float64, which
    is computed under `Double`, embeddings and head keep their stored dtype: they are the greatest tensors.
    """

    def plain_read(name: str) -> torch.Tensor:
        with Double.off():
            return read(name)

    with _parameters_on_meta(), no_init_weights(), local_torch_dtype(dtype):
        model = make().eval()
    stored = set(model.state_dict())
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        prefix, parameters = f"{path}." if path else "", _own_parameters(module)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if prefix + name in stored:
                setattr(module, name, plain_read(prefix + name).to(buffer.dtype))
        if parameters and type(module).forward is nn.Module.forward:  # never called: others use its parameters
            for name in parameters:
                parameters[name] = _parameter(plain_read(prefix + name), dtype)
        elif parameters:
            great = dtype == torch.float64 and (module is head or isinstance(module, nn.Embedding))
            _stream(module, prefix, plain_read, None if great else dtype)
    return model


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of `module` without its submodules', in the dict that torch reads them from."""
    return module._parameters  # pyright: ignore[reportPrivateUsage]


def _parameter(values: torch.Tensor, dtype: torch.dtype | None) -> nn.Parameter:
    """A parameter without gradient, in `dtype`; None keeps the type of the values."""
    return nn.Parameter(values if dtype is None else values.to(dtype), requires_grad=False)


def _stream(module: nn.Module, prefix: str, read: Read, dtype: torch.dtype | None) -> None:
    """Let `module` read its parameters before each call, and drop them after it."""
    parameters = _ReadWhenAsked(_own_parameters(module), lambda name: _parameter(read(prefix + name), dtype))
    module._parameters = parameters  # pyright: ignore[reportPrivateUsage]

    def fetch(*_: object) -> None:
        parameters.held = {name: parameters[name] for name in parameters}

    def drop(*_: object) -> None:
        parameters.held = {}

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(drop)


class _ReadWhenAsked(dict[str, nn.Parameter | None]):
    """Parameters of a module by name. One that is asked for outside of the module's call is read for that alone: fused
    kernels take the weights of a convolution, and never call it.

    held: parameters in memory.
    """

    def __init__(self, parameters: dict[str, nn.Parameter | None], read: Callable[[str], nn.Parameter]):
        super().__init__(parameters)
        self._read, self.held = read, dict[str, nn.Parameter | None]()

    def __getitem__(self, name: str) -> nn.Parameter | None:
        if name in self.held or super().__getitem__(name) is None:
            return self.held.get(name)
        return self._read(name)


@contextmanager
def _parameters_on_meta() -> Generator[None]:
    """Parameters that are made within it have no memory; buffers do, as they are computed."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param if param is None else nn.Parameter(param.to("meta"), False))

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
