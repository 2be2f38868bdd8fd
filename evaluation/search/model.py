"""A plain model that runs any program of its layers.

The model is the recurrent-depth one around the source's own modules. A program sets its three parts, so whatever is
measured here is what a converted checkpoint computes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from ...model.call import Call, Place
from ...model.source_layers import TUPLE_LAYERS, Tap, layer_list_name
from .program import Program

MEMORY = 1 << 30  # bytes of kept states


class ProgramModel(RecurrentDepthForCausalLM):
    """`source`, a plain causal language model, whose calls run `program`; it is this model's from then on.

    States [B, T, D] behind the first layers of a program are kept for calls with the same tokens: programs share most
    of their beginnings. The least recently used ones make room.
    """

    def __init__(self, source: PreTrainedModel):
        count = source.config.num_hidden_layers
        first = Program.chain(tuple(range(count)))
        config = RecurrentDepthConfig(
            source_config=source.config, prelude=[*first.prelude], core=[*first.core], coda=[], injection="none"
        )
        with torch.device("meta"):
            super().__init__(config)
        name = layer_list_name(source, count)
        self.layers = [*source.get_submodule(name).children()]
        as_tuple = source.config.model_type in TUPLE_LAYERS
        taps = [Tap(i, self._visit, as_tuple, layer) for i, layer in enumerate(self.layers)]
        source.set_submodule(name, nn.ModuleList(taps))
        self.source = source
        self.generation_config = source.generation_config
        self._kept: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()
        self._room = MEMORY
        self._inputs: tuple[Any, ...] | None = None
        self._part = ""  # prelude or coda: the part of the next `_run`
        self.layers_run = 0  # runs of a layer since the last reset, those of kept states left out
        self.program = first
        self.run_program(first)

    def run_program(self, program: Program) -> None:
        """Let the calls that follow run `program`."""
        config = self.config
        config.prelude, config.core, config.coda = [*program.prelude], [*program.core], [*program.coda]
        config.num_recurrences = config.max_recurrences = program.recurrences
        config.recurrence_damping = self.damping.kind = program.damping
        for part in ("prelude", "core", "coda"):
            setattr(self, part, nn.ModuleList(self.layers[layer] for layer in getattr(program, part)))
        self.program = program

    def forget(self) -> None:
        """Drop all kept states."""
        self._kept.clear()
        self._room = MEMORY

    def _run_source(self, call: Call, inputs: dict[str, Any]) -> Any:
        parts = [inputs.get(name) for name in ("input_ids", "attention_mask")]
        self._inputs = tuple(None if x is None else (x.shape, x.cpu().numpy().tobytes()) for x in parts)
        return super()._run_source(call, inputs)

    def _places(self, part: str) -> list[Place]:
        self._part = part
        return super()._places(part)

    def _run(
        self, places: list[Place], x: torch.Tensor, call: Call, selection: Any = None, time: Any = None
    ) -> torch.Tensor:
        """Layers in order; those of the prelude from the longest kept beginning on."""
        if self._part != "prelude" or not places or places[0].depth is not None or call.cache is not None:
            self.layers_run += len(places)
            return super()._run(places, x, call, selection, time)
        ids = tuple(place.source_layer for place in places)
        done, x = self._longest(ids, x)
        for end in range(done + 1, len(ids) + 1):
            x = super()._run(places[end - 1 : end], x, call)
            self._keep((self._inputs, ids[:end]), x)
        self.layers_run += len(ids) - done
        return x

    def _longest(self, ids: Sequence[int], x: torch.Tensor) -> tuple[int, torch.Tensor]:
        """(number of first layers whose state is kept, that state); (0, x) for none."""
        for end in range(len(ids), 0, -1):
            key = (self._inputs, tuple(ids[:end]))
            if key in self._kept:
                self._kept.move_to_end(key)
                return end, self._kept[key]
        return 0, x

    def _keep(self, key: tuple[Any, ...], state: torch.Tensor) -> None:
        self._kept[key] = state
        self._room -= state.nbytes
        while self._room < 0 and self._kept:
            self._room += self._kept.popitem(last=False)[1].nbytes
