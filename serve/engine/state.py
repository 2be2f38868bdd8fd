"""Every dense tensor of the engine: requests by row, lanes by number. Only transitions/ writes them.

A *row* belongs to one resident request; a last, spare row takes part in passes that are padded. A *lane* is a position
in flight. The first lanes are decode lanes, `ring` for each row; then come prompt lanes; the last one is the spare
row's and never leaves. Compiled steps keep the tensors that they first saw, so no tensor is ever replaced.

Shapes: R = max_num_seqs + 1 rows, L lanes, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, get_args, get_type_hints

import torch
from torch import Tensor

from ...model.configuration_recurrent_depth import RecurrentDepthConfig
from .kv import KVPolicy
from .loop_config import LoopConfig
from .request import MAX_STOPS, NEVER

int32, int64, float32, flag = torch.int32, torch.int64, torch.float32, torch.bool
states = None  # the type of the model's states, known when a State is created


@dataclass(eq=False)
class RequestState:
    """One entry for each resident request, and one for the spare row [R, ...].

    Each line: type, further dimensions (sizes of State.create by name), meaning; the transitions that write it.
    """

    block_table: Annotated[Tensor, int32, "num_blocks"]  # numbers of the row's KV blocks; set_block_table
    num_recurrences: Annotated[Tensor, int64]  # greatest depth; admit
    min_recurrences: Annotated[Tensor, int64]  # recurrences before the exit rule may fire; admit
    rule: Annotated[Tensor, int64]  # exit rule, as exits.NUMBER; admit
    threshold: Annotated[Tensor, float32]  # threshold of the exit rule; admit
    forced_depths: Annotated[Tensor, int32, "positions"]  # depth, forced or actual, or 0; admit, settle, emit, commit
    remaining: Annotated[Tensor, int64]  # tokens that may still be generated; admit, emit, commit
    max_in_flight: Annotated[Tensor, int64]  # positions in flight with the decoder wave, else 1; admit
    drafts: Annotated[Tensor, int64, "depths"]  # depths up to each at which a wave drafts; admit, set_cadence
    next_position: Annotated[Tensor, int64]  # position of the newest token, whose lane runs; admit, emit, commit
    refines: Annotated[Tensor, flag]  # the decoder is diffusion; admit
    phase: Annotated[Tensor, int64]  # recurrences in this step of a diffusion; admit, settle, restart_phase
    passes: Annotated[Tensor, int64]  # passes since the prompt; admit, settle
    lane_passes: Annotated[Tensor, int64]  # sum of the row's lanes over these passes; admit, settle
    stops: Annotated[Tensor, int64, "stops"]  # stop tokens; -1: none; admit
    sampled_by_host: Annotated[Tensor, flag]  # tokens are sampled between steps; admit
    wants_prompt_logits: Annotated[Tensor, flag]  # a reader gets the head's input at prompt positions; admit
    samples: Annotated[Tensor, flag]  # tokens are not plain argmax; admit
    live: Annotated[Tensor, flag]  # is in this step, and has not stopped; admit, release, begin_step, emit, commit
    saw_nonfinite: Annotated[Tensor, flag]  # a state was not finite; admit, settle
    known_tokens: Annotated[Tensor, int32, "positions"]  # token + 1; 0: to be sampled; admit, set_known_tokens
    tokens: Annotated[Tensor, int64, "step_tokens"]  # tokens of this step; emit, commit
    count: Annotated[Tensor, int64]  # how many of them; begin_step, emit, commit, clear_spare_count
    depths: Annotated[Tensor, int64, "step_tokens"]  # recurrences of the position that gave each of them; emit, commit


@dataclass(eq=False)
class LaneState:
    """One entry for each lane [L, ...]. Each line as in RequestState. `clear_flags` clears flags after a warm-up."""

    row: Annotated[Tensor, int64]  # row of the request; start
    position: Annotated[Tensor, int64]  # position in the request; start
    depth: Annotated[Tensor, int64]  # recurrences done; start, settle
    exit_at: Annotated[Tensor, int64]  # depth at which the lane leaves, if no rule ends it before; start, set_exit
    may_exit: Annotated[Tensor, int64]  # 1 where the request's rule may end it; start
    token: Annotated[Tensor, int64]  # token that the lane started from; start, set_window_tokens
    draft_token: Annotated[Tensor, int64]  # draft of the next token; -1: none; start, set_drafts
    draft_depth: Annotated[Tensor, int64]  # depth at which the draft changed last; set_drafts
    exit_depth: Annotated[Tensor, int64]  # recurrences at the exit; settle, routers.py, set_window_change
    steps_unchanged: Annotated[Tensor, int64]  # steps without a new token (diffusion); windows.py
    s: Annotated[Tensor, states, "hidden"]  # state; start, settle, windows.py
    e: Annotated[Tensor, states, "hidden"]  # input, the prelude's output; start, windows.py
    readout_state: Annotated[Tensor, states, "hidden"]  # state at the exit; settle, windows.py
    change: Annotated[Tensor, states, "hidden"]  # change of s in the last step (diffusion); windows.py
    running: Annotated[Tensor, flag]  # takes part in passes; start, settle, release, exit_at_once, drop
    wants_token: Annotated[Tensor, flag]  # a token comes of it; start, start_prompts
    uncommitted: Annotated[Tensor, flag]  # its token is not out yet; start, emit, commit, release, drop
    waiting: Annotated[Tensor, flag]  # has left or drafts, not read out; steps.py, windows.py, release, exit_at_once
    exited: Annotated[Tensor, flag]  # has left; may run on to fill its KV slots; start, settle, exit_at_once, drop


@dataclass(eq=False)
class State:
    """All of it, with the numbers that fix its shape."""

    config: LoopConfig
    policy: KVPolicy
    requests: RequestState
    lanes: LaneState
    turn: Tensor  # int64 [2]: first row of this pass, then of the next, where not all fit; choose, enter, nearest
    budget: Tensor  # int64 []: lanes of a pass that waves may fill, 0 for no bound; set_budget
    settled: Tensor  # int64 [R, depths + 1]: positions of waves, by draft_depth; commit, take_settled, clear_settled
    ring: int  # decode lanes of a row
    num_decode_lanes: int  # decode lanes of all rows; prompt lanes follow
    spare: int  # number of the last lane
    keeps_input: bool  # the core reads e

    @classmethod
    def create(
        cls,
        config: LoopConfig,
        policy: KVPolicy,
        model: RecurrentDepthConfig,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> State:
        """An empty state on `device` for a model with the RecurrentDepthConfig `model`; `dtype` is that of states."""
        ring = (policy.depths if policy.complete else 1) + config.max_in_flight - 1
        num_decode_lanes = config.max_num_seqs * ring
        spare = num_decode_lanes + config.max_num_batched_tokens
        sizes = {
            "num_blocks": config.num_blocks,
            "positions": config.max_model_len + 1,
            # Each pass puts out at most a whole wave.
            "step_tokens": (config.passes_per_step + policy.depths + 1) * config.max_in_flight,
            "stops": MAX_STOPS,
            "depths": policy.depths + 1,
            "hidden": model.hidden_size,
        }

        def zeros(kind: type, count: int) -> dict[str, Tensor]:
            made = {}
            for name, hint in get_type_hints(kind, include_extras=True).items():
                _, of, *shape = get_args(hint)
                made[name] = torch.zeros(count, *(sizes[size] for size in shape), dtype=of or dtype, device=device)
            return made

        requests = RequestState(**zeros(RequestState, config.max_num_seqs + 1))
        lanes = LaneState(**zeros(LaneState, spare + 1))
        requests.num_recurrences[-1] = NEVER
        lanes.row[spare], lanes.exit_at[spare] = config.max_num_seqs, NEVER
        turn, budget, settled = (lanes.row.new_zeros(n) for n in ([2], [], [len(requests.live), policy.depths + 1]))
        rest = ring, num_decode_lanes, spare, model.injection != "none"
        return cls(config, policy, requests, lanes, turn, budget, settled, *rest)

    @property
    def device(self) -> torch.device:
        return self.lanes.row.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        held = [self.turn, self.budget, self.settled, *vars(self.requests).values(), *vars(self.lanes).values()]
        return sum(tensor.nbytes for tensor in held)

    def lane_of(self, row: Tensor, position: Tensor) -> Tensor:
        """The decode lane of a position [...] of a row [...]."""
        return row * self.ring + position % self.ring

    def span(self, row: int, first: int, last: int) -> Tensor:
        """The decode lanes [last - first] of positions `first` to `last` (excluded) of a row."""
        return row * self.ring + torch.arange(first, last, device=self.device) % self.ring

    def live_flags(self, flag: Tensor) -> Tensor:
        """[num_decode_lanes]: the lane has `flag` [L], and its row is live."""
        return (flag[: self.num_decode_lanes].view(-1, self.ring) & self.requests.live[:-1, None]).view(-1)

    def live_lanes(self, flag: Tensor) -> Tensor:
        """Numbers [n] of the decode lanes that have `flag` [L], of live rows. Waits for the device."""
        return self.live_flags(flag).nonzero().squeeze(1)
