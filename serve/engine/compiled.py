"""A pass of the core as one compiled graph, for any number of lanes.

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

_owners: WeakValueDictionary[int, Any] = WeakValueDictionary()
_library = torch.library.Library("loopwise", "DEF")
_library.define(
    "attend(int owner, int layer, Tensor q, Tensor k, Tensor v, "
    "float scaling, int window, float softcap, Tensor? sinks) -> Tensor"
)


def compiled(function: Callable) -> Callable:
    """`function` of tensors [N, ...], compiled at its first call, whose tensors are `of_any_length`. Nothing but N may
    change from call to call, as nothing is checked again."""
    # Compiled code is kept with the code object, so each gets one of its own: others run with another model.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    options = {**OPTIONS, "guard_filter_fn": lambda guards: [False] * len(guards)}
    return torch.compile(own, dynamic=False, fullgraph=True, options=options)


def of_any_length(*tensors: torch.Tensor) -> None:
    """Say of tensors [N, ...] that N will change. It must be above 1 here, which would be taken for a constant; of
    other tensors, a size that happens to be N, too, is none."""
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)


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
