"""Compiled functions for any number of lanes: the recurrence, and the steps of a tick around it.

torch.compile fuses the operations between matrix products, and removes Python's share of a tick. It sees attention as
one operation, which looks its cache up when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

# Inductor's options on a CPU, as vLLM has them for its own models.
OPTIONS = {
    "dce": True,
    "size_asserts": False,
    "nan_asserts": False,
    "epilogue_fusion": True,
    "cpp.dynamic_threads": True,
}

ALONE = {"cpp.threads": 1, "cpp.dynamic_threads": False}  # for steps too small to share among threads

_owners: WeakValueDictionary[int, Any] = WeakValueDictionary()
_library = torch.library.Library("loopwise", "DEF")
_library.define(
    "attend(int owner, int layer, Tensor q, Tensor k, Tensor v, "
    "float scaling, int window, float softcap, Tensor? sinks) -> Tensor"
)
_library.define("add(Tensor x, Tensor? residual) -> Tensor")


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` of an object and tensors [N, ...], compiled at its first call.

    The tensors of that call must be distinct, with distinct lengths > 1 for every dynamic size: a length of 1 counts as
    a constant. Later calls may change lengths and values alone; the object's own tensors stay those of the first call.
    Raises RuntimeError where an input or output of the compiled code cannot be matched.
    """
    # Compiled code is cached by code object. Each function gets one of its own, as others run with another model.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    graph: list[_Graph] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # these take seconds to import

        def inner(*args: Any, **kwargs: Any) -> Any:
            graph.append(_Graph(compile_fx_inner(*args, **kwargs)))
            return graph[0]

        with config.patch(enable_autograd_cache=False):  # a hit would bypass `inner`
            made: Any = compile_fx(module, inputs, inner, config_patches={**OPTIONS, **options})
        return made

    first = torch.compile(own, dynamic=False, fullgraph=True, backend=backend)

    def call(owner: Any, *tensors: Tensor) -> Any:
        if graph:
            return graph[0].again(tensors)
        assert not torch.is_grad_enabled(), "autograd gives the code other tensors than the function's"
        assert len({id(tensor) for tensor in tensors}) == len(tensors), "one tensor for two is one input"
        for tensor in tensors:  # another size that equals N stays constant
            torch._dynamo.mark_dynamic(tensor, 0)  # pyright: ignore[reportPrivateUsage]
        out = first(owner, *tensors)
        graph[0].learn(tensors, out)
        return out

    return call


class _Graph:
    """Inductor's code, called directly. Its inputs are the function's tensors, their lengths, and the object's tensors,
    which stay.

    torch.compile's own wrapper looks all of them up again for every call, which takes as long as some layers do.
    Autograd's wrapper takes twice as long as the code of a tick.
    """

    _boxed_call = True  # takes a list of inputs, which it may empty

    def __init__(self, code: Any):
        self.code = code
        self.inputs: list[Any] = []
        self.outputs: Any = None

    def __call__(self, inputs: list[Any]) -> Any:
        self.inputs = inputs.copy()
        self.outputs = self.code(inputs)
        return self.outputs

    def learn(self, tensors: tuple[Tensor, ...], out: Any) -> None:
        """Match inputs and outputs of the first call with its tensors. Raises RuntimeError where one has no match."""
        place = {id(value): n for n, value in enumerate(self.inputs)}
        self.tensors = [(place[id(t)], n) for n, t in enumerate(tensors) if id(t) in place]
        of_length = {len(t): n for n, t in enumerate(tensors)}
        self.lengths = [(n, of_length.get(value)) for n, value in enumerate(self.inputs) if isinstance(value, int)]
        place = {id(value): n for n, value in enumerate(self.outputs)}
        # `current_callable` skips a check for profilers on every call.
        self.run = getattr(self.code, "current_callable", None) or self.code
        self.single = isinstance(out, Tensor)
        self.results = [place.get(id(value)) for value in ((out,) if self.single else out)]
        if None in self.results or None in dict(self.lengths).values():
            raise RuntimeError(f"a compiled graph with inputs of lengths {self.lengths} and outputs {self.results}")
        for n, _ in self.tensors:
            self.inputs[n] = None
        self.outputs = None

    def again(self, tensors: tuple[Tensor, ...]) -> Any:
        inputs = self.inputs.copy()
        for place, n in self.tensors:
            inputs[place] = tensors[n]
        for place, n in self.lengths:
            inputs[place] = len(tensors[n])  # pyright: ignore[reportArgumentType, reportCallIssue]
        outputs = self.run(inputs)
        return outputs[self.results[0]] if self.single else [outputs[n] for n in self.results]


def register(parts: Any) -> int:
    """A number by which compiled code finds `parts`, which have an `attention`."""
    _owners[id(parts)] = parts
    return id(parts)


def attend(parts: Any, layer: int, q: Tensor, k: Tensor, v: Tensor, **facts: Any) -> Tensor:
    """`parts.attention(layer, q, k, v, **facts)`; see attention.base.Attention."""
    if not torch.compiler.is_compiling():
        return parts.attention(layer, q, k, v, **facts)
    window, softcap = facts.get("sliding_window") or 0, facts.get("softcap") or 0.0
    scaling, sinks = facts.get("scaling", 0.0), facts.get("sinks")
    return torch.ops.loopwise.attend(parts.number, layer, q, k, v, scaling, window, softcap, sinks)


def _attend(
    owner: int,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    facts = {"scaling": scaling, "sliding_window": window or None, "softcap": softcap or None, "sinks": sinks}
    return _owners[owner].attention(layer, q, k, v, **facts)


def _attend_shape(owner: int, layer: int, q: Tensor, *rest: Any) -> Tensor:
    """The shape of `_attend`, for torch.compile."""
    return q.new_empty(q.shape)


def add(x: Tensor, residual: Tensor | None) -> Tensor:
    """x + residual [N, D], as one operation that torch.compile cannot fuse with others.

    vLLM's layers write their results into tensors that they are given. Inductor may fuse what reads such a tensor with
    an operation before that write (torch 2.13): its check of dependencies takes the tensor's first version.
    """
    return torch.ops.loopwise.add(x, residual)


def _add(x: Tensor, residual: Tensor | None) -> Tensor:
    return x.clone() if residual is None else x + residual


def _add_shape(x: Tensor, residual: Tensor | None) -> Tensor:
    """The shape of `_add`, for torch.compile."""
    return torch.empty_like(x)


_library.impl("add", _add, "CompositeExplicitAutograd")
torch.library.register_fake("loopwise::add", _add_shape, lib=_library)
_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("loopwise::attend", _attend_shape, lib=_library)
