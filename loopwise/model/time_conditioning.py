"""Time conditioning: a recurrence knows how far it is, and how long its step is (LoopFormer, arXiv 2602.11451).

Recurrence r of R, counted from 0, has the time r / R and the step 1 / R. Outputs of modules inside the core are
multiplied by factors that depend on both. Shapes: D width, F frequencies, N rows of a lane engine.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import silu


class Factor(nn.Linear):
    """W c + b, which is the number `start` at the start: W = 0, b = `start`."""

    def __init__(self, width: int, size: int, start: float):
        super().__init__(width, size)
        self.start = start


class Modulation(nn.Module):
    """The factors of one core layer, from the conditioning c [.., D]: 1 + W c + b for the modules `scale`, and W c + b
    for the modules `gate`. At the start all are 1.

    Registers hooks on the layer, which is called with an argument `time`: c, or the number of a row of the table.
    """

    def __init__(self, layer: nn.Module, width: int, scale: list[str], gate: list[str]):
        super().__init__()
        self.scale, self.gate = nn.ModuleDict(), nn.ModuleDict()
        self._hooked: dict[str, tuple[nn.Module, Any]] = {}  # by name: the module with the hook, and the hook's handle
        for kind, names in ((self.scale, scale), (self.gate, gate)):
            for name in names:
                size = getattr(layer.get_submodule(name), "out_features", width)
                kind[name.replace(".", "-")] = Factor(width, size, float(kind is self.gate))
        self._attach(layer)
        self.tables: dict[nn.Module, torch.Tensor] = {}  # by linear module: its factors [pairs, size]
        self._time = torch.empty(0)
        layer.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _attach(self, layer: nn.Module) -> None:
        """Hook the modules that stand at the names now: adapters and quantisation replace them after loading."""
        for kind, offset in ((self.scale, 1.0), (self.gate, 0.0)):
            for key, factor in kind.items():
                module = layer.get_submodule(key.replace("-", "."))
                had = self._hooked.get(key)
                if had is None or had[0] is not module:
                    if had:
                        had[1].remove()
                    hook = partial(self._multiply, factor, offset)
                    self._hooked[key] = (module, module.register_forward_hook(hook))

    def tabulate(self, c: torch.Tensor) -> None:
        """Compute the factors of all conditionings c [pairs, D] now; a `time` is the number of one from here on."""
        for kind, offset in ((self.scale, 1.0), (self.gate, 0.0)):
            self.tables.update({linear: (linear(c) + offset).detach() for linear in kind.values()})

    def _enter(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward pre-hook of the layer. A lane engine calls `at` itself, and the layer without `time`."""
        if "time" in kwargs:
            self.at(kwargs.pop("time"))
            self._attach(layer)
        return args, kwargs

    def at(self, time: torch.Tensor) -> None:
        """The next run of the layer has this `time`."""
        self._time = time

    def _multiply(self, linear: nn.Module, offset: float, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """A forward hook: the output [.., size] of a module, or the first of a tuple, times its factor."""
        factor = self.tables[linear][self._time] if self.tables else linear(self._time) + offset
        first = out[0] if isinstance(out, tuple) else out
        product = first * factor.to(first.device)  # a `device_map` may place the two apart
        return (product, *out[1:]) if isinstance(out, tuple) else product


class TimeConditioning(nn.Module):
    """c = silu(time(r / R) + step(1 / R)) [.., D], and the `Modulation` of every core layer.

    scale, gate: names of modules inside a core layer whose outputs are multiplied.   frequencies: of the sines and
    cosines of time and step, F / 2 each.
    """

    def __init__(self, layers: nn.ModuleList, width: int, scale: list[str], gate: list[str], frequencies: int = 256):
        super().__init__()
        self.time, self.step = (
            nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(2)
        )
        self.frequencies = frequencies
        self.layers = nn.ModuleList(Modulation(layer, width, scale, gate) for layer in layers)

    def forward(self, depth: int | torch.Tensor, recurrences: int | torch.Tensor, device: torch.device) -> torch.Tensor:
        """c [.., D] of recurrence `depth`, counted from 0, of R `recurrences`: numbers or tensors [..]. device: that of
        the states, as the weights may be loaded only now."""
        total = torch.as_tensor(recurrences, device=device).float()
        return silu(self.time(self._waves(depth / total)) + self.step(self._waves(1 / total)))

    @property
    def _first(self) -> torch.Tensor:
        return cast(nn.Linear, self.time[0]).weight

    def _waves(self, x: torch.Tensor) -> torch.Tensor:
        """Cosines, then sines, of x [..]: [.., F], in the type of the weights."""
        half = torch.arange(self.frequencies // 2, device=x.device, dtype=torch.float32) / (self.frequencies // 2)
        angles = x[..., None] * torch.exp(-math.log(10_000) * half)
        return torch.cat([angles.cos(), angles.sin()], -1).to(self._first.dtype)

    def tabulate(self, most: int) -> None:
        """Compute the factors of all depths and R up to `most` now. A layer's `time` is a `row` from here on."""
        pairs = torch.tensor([(depth, total) for total in range(1, most + 1) for depth in range(total)])
        device = self._first.device
        c = self(*pairs.to(device).T, device)
        for layer in self.layers:
            layer.tabulate(c)  # pyright: ignore[reportCallIssue]

    @staticmethod
    def row(depths: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        """The row [N] of the table for recurrences `depths` [N] or [1] of `limits` [N]. Padding rows have R = 0."""
        total = limits.clamp(min=1)
        return total * (total - 1) // 2 + torch.minimum(depths, total - 1)
