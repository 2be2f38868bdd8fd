"""The transition `choose`: rows take turns."""

from __future__ import annotations

import random

import torch

from loopwise.serve import Engine
from loopwise.serve.engine.transitions.steps import choose, enter
from tests.helpers.engines import build


@torch.inference_mode()
def test_rows_take_turns():
    """A pass takes one lane a row, from the row at which the last pass ended; the other lanes come behind."""
    state = Engine(
        build(), max_num_seqs=7, max_model_len=50, max_lanes=3, max_in_flight=4, kv_policy="last-exited"
    ).loop.state
    lanes, live, draw, turn = state.lanes, state.requests.live, random.Random(0), 0
    for _ in range(200):
        lanes.running[: state.num_decode_lanes] = False
        live[:7] = torch.tensor([draw.random() < 0.8 for _ in range(7)])
        running = [row * state.ring + draw.randrange(state.ring) for row in range(7) if draw.random() < 0.7]
        waiting = [lane for lane in range(state.num_decode_lanes) if draw.random() < 0.1]
        lanes.running[running], lanes.waiting[: state.num_decode_lanes] = True, False
        lanes.waiting[waiting] = True
        runs, waits = ([n for n in some if live[n // state.ring]] for some in (running, waiting))
        first = [n for n in runs if n // state.ring >= turn] + [n for n in runs if n // state.ring < turn]
        choose(state)  # without `enter`: no row loses its turn
        order, counts = choose(state)
        assert (order[: len(runs)].tolist(), counts.tolist()) == (first, [len(waits), len(runs), 0])
        if first:
            enter(state, order[: min(len(runs), 3)])
            turn = first[2] // state.ring + 1 if len(first) > 3 else turn
