"""Requests come and go, between passes.

Shapes: m rows or lanes, n tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..request import MAX_STOPS, Request
from ..state import State
from .drafts import table


def admit(state: State, row: int, request: Request, rule: int, passes: int = 0, lane_passes: int = 0) -> None:
    """Give `row` to `request`, whose exit rule is number `rule`. `passes` and `lane_passes` were spent before a
    preemption. Raises ValueError for more than MAX_STOPS stop tokens, with nothing written."""
    requests = state.requests
    if len(request.stops) > MAX_STOPS:
        raise ValueError(f"{len(request.stops)} stop tokens: at most {MAX_STOPS}")
    requests.num_recurrences[row], requests.min_recurrences[row] = request.num_recurrences, request.min_recurrences
    requests.rule[row], requests.threshold[row] = rule, request.threshold
    requests.forced_depths[row], requests.known_tokens[row] = 0, 0
    depths = torch.tensor(request.forced_depths[: state.config.max_model_len], dtype=torch.int32)
    requests.forced_depths[row, : len(depths)] = depths
    requests.remaining[row], requests.max_in_flight[row] = request.max_tokens, request.max_in_flight
    requests.next_position[row], requests.drafts[row] = -1, table(request, requests.drafts.shape[1])
    requests.passes[row], requests.lane_passes[row] = passes, lane_passes
    requests.refines[row], requests.phase[row] = request.diffusion is not None, 0
    requests.stops[row] = -1
    requests.stops[row, : len(request.stops)] = torch.tensor(request.stops, dtype=torch.long)
    requests.sampled_by_host[row] = request.sampled_by_host
    requests.wants_prompt_logits[row] = request.wants_prompt_logits
    requests.samples[row] = request.sampling != "argmax" or request.penalised
    requests.live[row] = requests.saw_nonfinite[row] = False


def release(state: State, row: int, prompt_lanes: list[tuple[int, int]]) -> None:
    """Stop all lanes of `row`, prompt lanes `first` to `last` (excluded) among them."""
    lanes = state.lanes
    for first, last in [(row * state.ring, (row + 1) * state.ring), *prompt_lanes]:
        lanes.running[first:last] = lanes.waiting[first:last] = lanes.uncommitted[first:last] = False
    state.requests.live[row] = False


def set_block_table(state: State, rows: Tensor, places: Tensor | slice, blocks: Tensor) -> None:
    """Rows [n] have KV `blocks` [n] at `places` [n] of their tables from now on, or [n, B] at a slice of them."""
    state.requests.block_table[rows, places] = blocks


def set_known_tokens(state: State, row: int, first: int, tokens: Tensor) -> None:
    """Tokens [n] of a row, at positions `first` and after, are known: they are neither sampled nor put out."""
    state.requests.known_tokens[row, first : first + len(tokens)] = tokens.int() + 1


def begin_step(state: State, rows: Tensor) -> None:
    """A step begins in which `rows` [m] take part, as far as they may generate tokens; the others pause."""
    requests = state.requests
    requests.count.zero_()
    requests.live.zero_()
    requests.live[rows] = requests.remaining[rows] > 0


def start_prompts(state: State, where: Tensor, last: Tensor, wants_token: Tensor) -> None:
    """The `last` lane of each prompt [m] gives a token where `wants_token` [m]; the other prompt lanes `where` [n] give
    none."""
    state.lanes.wants_token[where] = False
    state.lanes.wants_token[last] = wants_token
