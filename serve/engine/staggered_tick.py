"""The eager tick with several positions of a request in flight: the decoders wave and diffusion beside plain decoding.

Shapes: n lanes of a pass, m lanes that are read out, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decoders import wave
from .decoders.diffusion import Diffusion
from .eager_tick import EagerTick
from .tick import Reader, TickContext, TickReport
from .transitions import windows
from .transitions.steps import Steps


class StaggeredTick(EagerTick):
    """An EagerTick that puts out and starts the lanes of waves and diffusions, too."""

    def __init__(self, context: TickContext, steps: Steps, reader: Reader | None, diffusion: Diffusion):
        super().__init__(context, steps, reader)
        self.diffusion = diffusion

    @property
    def budget(self) -> int:
        """Lanes that waves may fill a pass up to; 0: no bound."""
        return self.work.budget

    @budget.setter
    def budget(self, lanes: int) -> None:
        self.work.budget = lanes
        windows.set_budget(self.state, lanes)

    @property
    def staggered(self) -> bool:
        return bool(self.diffusion.windows or self.work.waves)

    def run(self, max_passes: int) -> TickReport:
        report = super().run(max_passes)
        if self.diffusion.windows:
            self._refine()
        return report._replace(ended=self.ended)

    # ---- a pass ---------------------------------------------------------------------------------------------------
    def _until_read(self) -> int:
        if self.diffusion.windows:
            return 1
        return max(self.schedule.every - self.schedule.since, 1) if self.work.waves else super()._until_read()

    def _width(self, decodes: Tensor) -> int:
        width = super()._width(decodes)
        if width or not (self.budget and self.staggered):
            return width
        return wave.lane_budget(self.state, decodes, self.budget)

    def _slots(self, which: Tensor, row: Tensor, depth: Tensor) -> Tensor:
        """Each step of a diffusion goes through the same recurrences, and writes their slots again."""
        if not self.diffusion.windows:
            return depth
        refines = self.state.requests.refines[row] & (which < self.state.num_decode_lanes)
        return torch.where(refines, self.state.requests.phase[row], depth)

    # ---- waves ----------------------------------------------------------------------------------------------------
    def _emit(self, which: Tensor, row: Tensor, position: Tensor, tokens: Tensor) -> None:
        """Put out tokens [m] of plain lanes. Those of waves are drafts first; the certain ones are put out, and each
        wave starts one position more."""
        if not self.work.waves:
            super()._emit(which, row, position, tokens)
            return
        windows.set_drafts(self.state, which, tokens)
        waves = (self.state.requests.max_in_flight[row] > 1) & (which < self.state.num_decode_lanes)
        plain = (~waves).nonzero().squeeze(1)
        if len(plain):
            super()._emit(which[plain], row[plain], position[plain], tokens[plain])
        if len(plain) < len(which):
            start = wave.advance(self.state, torch.tensor(list(self.work.waves), device=which.device))
            self.ended |= bool(start.stopped.any())
            some = start.there.nonzero().squeeze(1)
            self._start(start.row[some], start.position[some], start.token[some])

    def _emit_drafts(self, which: Tensor) -> None:
        """Put out the draft tokens of lanes `which` [m], one a row at most; nothing starts."""
        lanes = self.state.lanes
        row, position = lanes.row[which], lanes.position[which]
        _, stopped = self.steps.emit(self.state, which, row, position, lanes.draft_token[which])
        self.ended |= bool(stopped.any())

    # ---- diffusions -----------------------------------------------------------------------------------------------
    def _start(self, row: Tensor, position: Tensor, tokens: Tensor) -> None:
        """Start tokens [m] in decode lanes, or as the first of a diffusion's window."""
        if self.diffusion.settings:
            refines = self.state.requests.refines[row]
            for n in refines.nonzero().squeeze(1).tolist():
                self.diffusion.start(int(row[n]), int(position[n]), tokens[n])
            row, position, tokens = row[~refines], position[~refines], tokens[~refines]
        super()._start(row, position, tokens)

    def _refine(self) -> None:
        """Diffusions whose step is over put out their frozen tokens, and go on to the next step."""
        state, rows = self.state, self.diffusion.due()
        if not rows:
            return
        self.order = None
        which = self.diffusion.lanes(rows)
        row, position = state.lanes.row[which], state.lanes.position[which]
        self.counts.reads[len(which)] += 1
        logits, best = self.forward.head(self.forward.read_out(state.lanes.s[which], row, position))
        steps = self.diffusion.freeze(rows, self.context.sampler(logits, best, row, position + 1))
        for step in steps:
            for lane in step.committed:
                self._emit_drafts(lane[None])
                if not bool(state.requests.live[step.row]):
                    break
        self.diffusion.move_on(steps)
