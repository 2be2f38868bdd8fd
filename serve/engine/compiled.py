"""A pass of the core, and what a tick does around it, as compiled graphs for any number of lanes.

torch.compile fuses what lies between the matrix products, and drops Python's share of a tick. It need not know the
cache: attention is one operation to it, and whose it is is looked up when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary

import torch

# What inductor is told on a CPU: as vLLM tells it for its own models.
OPTIONS = {
    "dce": True,
    "size_asserts": False,
    "nan_asserts": False,
    "epilogue_fusion": True,
    "cpp.dynamic_threads": True,
}

ALONE = {"cpp.threads": 1, "cpp.dynamic_threads": False}  # for little work, which other threads would only wait for

_owners: WeakValueDictionary[int, Any] = WeakValueDictionary()
_library = torch.library.Library("loopwise", "DEF")
_library.define(
    "attend(int owner, int layer, Tensor q, Tensor k, Tensor v, "
    "float scaling, int window, float softcap, Tensor? sinks) -> Tensor"
)


def compiled(function: Callable, **options: Any) -> Callable:
    """`function` of an object and tensors [N, ...], compiled at its first call, whose tensors are not the same ones, of
    lengths that differ where they may, and above 1, which would be taken for a constant. Nothing but lengths and values
    may change from call to call: the tensors that the object has are those of the first one."""
    # Compiled code is kept with the code object, so each gets one of its own: others run with another model.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    graph: list[_Graph] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # which take seconds to import

        def inner(*args: Any, **kwargs: Any) -> Any:
            graph.append(_Graph(compile_fx_inner(*args, **kwargs)))
            return graph[0]

        with config.patch(enable_autograd_cache=False):  # whose hits go past `inner`
            made: Any = compile_fx(module, inputs, inner, config_patches={**OPTIONS, **options})
        return made

    first = torch.compile(own, dynamic=False, fullgraph=True, backend=backend)

    def call(owner: Any, *tensors: torch.Tensor) -> Any:
        if graph:
            return graph[0].again(tensors)
        assert not torch.is_grad_enabled(), "autograd gives the code other tensors than the function's"
        assert len({id(tensor) for tensor in tensors}) == len(tensors), "one tensor for two is one input"
        for tensor in tensors:  # of others, a size that happens to be N, too, is none
            torch._dynamo.mark_dynamic(tensor, 0)
        out = first(owner, *tensors)
        graph[0].learn(tensors, out)
        return out

    return call


class _Graph:
    """Inductor's code, and how it is called: its inputs are the function's tensors, their lengths, and the object's
    own, which stay. torch.compile's own way to it looks all of those up again for every call, which takes as long as
    some layers do; what autograd puts around it twice as long as the code of a tick."""

    _boxed_call = True  # takes a list of inputs, which it may empty

    def __init__(self, code: Any):
        self.code = code
        self.inputs: list[Any] = []
        self.outputs: Any = None

    def __call__(self, inputs: list[Any]) -> Any:
        self.inputs = inputs.copy()
        self.outputs = self.code(inputs)
        return self.outputs

    def learn(self, tensors: tuple[torch.Tensor, ...], out: Any) -> None:
        """What of the first call's inputs and outputs was what. Raises RuntimeError where that cannot be told."""
        place = {id(value): n for n, value in enumerate(self.inputs)}
        self.tensors = [(place[id(t)], n) for n, t in enumerate(tensors) if id(t) in place]
        of_length = {len(t): n for n, t in enumerate(tensors)}
        self.lengths = [(n, of_length.get(value)) for n, value in enumerate(self.inputs) if isinstance(value, int)]
        place = {id(value): n for n, value in enumerate(self.outputs)}
        self.run = getattr(self.code, "current_callable", None) or self.code  # past what asks for profilers every time
        self.single = isinstance(out, torch.Tensor)
        self.results = [place.get(id(value)) for value in ((out,) if self.single else out)]
        if None in self.results or None in dict(self.lengths).values():
            raise RuntimeError(f"a compiled graph with inputs of lengths {self.lengths} and outputs {self.results}")
        for n, _ in self.tensors:
            self.inputs[n] = None
        self.outputs = None

    def again(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        inputs = self.inputs.copy()
        for place, n in self.tensors:
            inputs[place] = tensors[n]
        for place, n in self.lengths:
            inputs[place] = len(tensors[n])  # pyright: ignore[reportArgumentType, reportCallIssue]
        outputs = self.run(inputs)
        return outputs[self.results[0]] if self.single else [outputs[n] for n in self.results]


def own(parts: Any) -> int:
    """A number by which compiled code finds `parts`, which have an `attention`."""
    _owners[id(parts)] = parts
    return id(parts)


def attend(parts: Any, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **facts: Any) -> torch.Tensor:
    """`parts.attention(layer, q, k, v, **facts)`; see engine.attention.Attention."""
    if not torch.compiler.is_compiling():
        return parts.attention(layer, q, k, v, **facts)
    window, softcap = facts.get("sliding_window") or 0, facts.get("softcap") or 0.0
    scaling, sinks = facts.get("scaling", 0.0), facts.get("sinks")
    return torch.ops.loopwise.attend(parts.number, layer, q, k, v, scaling, window, softcap, sinks)


def _attend(owner, layer, q, k, v, scaling, window, softcap, sinks):
    facts = {"scaling": scaling, "sliding_window": window or None, "softcap": softcap or None, "sinks": sinks}
    return _owners[owner].attention(layer, q, k, v, **facts)


_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("loopwise::attend", lambda owner, layer, q, *_: q.new_empty(q.shape), lib=_library)
