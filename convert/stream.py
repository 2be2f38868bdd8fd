"""Models whose weights are read when a module runs and dropped after it: memory holds one module, never the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype

from .double import Double

Read = Callable[[str], torch.Tensor]


def streamed(make: Callable[[], Any], read: Read, dtype: torch.dtype) -> Any:
    """The model that `make()` builds, in eval mode and `dtype`, with weights `read(name)` module by module.

    Buffers that are computed (rotary tables) stand in memory; those that are stored are read at once. In float64, which
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
        prefix = f"{path}." if path else ""
        for name, buffer in module._buffers.items():
            if buffer is not None and prefix + name in stored:
                module._buffers[name] = plain_read(prefix + name).to(buffer.dtype)
        if module._parameters and type(module).forward is nn.Module.forward:  # never runs: others use its parameters
            for name in module._parameters:
                module._parameters[name] = _parameter(plain_read(prefix + name), dtype)
        elif module._parameters:
            great = dtype == torch.float64 and (module is head or isinstance(module, nn.Embedding))
            _stream(module, prefix, plain_read, None if great else dtype)
    return model


def _parameter(values: torch.Tensor, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(values if dtype is None else values.to(dtype), requires_grad=False)


def _stream(module: nn.Module, prefix: str, read: Read, dtype: torch.dtype | None) -> None:
    empty = dict(module._parameters)

    def fetch(*_: object) -> None:
        for name, parameter in empty.items():
            if parameter is not None:
                module._parameters[name] = _parameter(read(prefix + name), dtype)

    def drop(*_: object) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(drop)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made in this context have no memory; buffers do, as they are computed."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param if param is None else nn.Parameter(param.to("meta"), False))

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
