"""The read-out schedule: exits wait for others, and are read out with them."""

from __future__ import annotations

import random
from collections import Counter

from loopwise.serve import Engine, Params
from loopwise.serve.engine.costs import Costs
from tests.helpers.engines import build


def test_exits_of_one_depth_meet():
    """Requests that start in different ticks are read out together after a first wait; later exits do not wait."""
    prompts, params = [[5, n, 6, 7] for n in range(3)], Params(40, 6, ignore_eos=True)

    def run(wait: int) -> tuple[list, int, int]:
        """Start a prompt in each of the first steps, of 8 ticks. Returns tokens, read-outs and passes."""
        engine = Engine(
            build(),
            max_num_seqs=3,
            max_model_len=64,
            max_recurrences=6,
            passes_per_step=8,
            max_num_batched_tokens=4,
            coda_wait=wait,
        )
        done = engine.generate(prompts, params)
        return [c.tokens for c in done], engine.loop.counts.reads.total(), engine.loop.counts.passes.total()

    (apart, many, _), (together, few, passes) = run(0), run(5)
    assert apart == together
    assert many > 2.5 * 40
    assert few < 1.3 * 40
    assert passes < 1.1 * 40 * 6


def test_exits_wait_while_passes_are_full_without_them():
    """With fewer lanes than requests, waiting exits leave passes full and share read-outs. Tokens stay the same."""
    draw = random.Random(0)
    prompts = [[5, n, 6, 7] for n in range(8)]
    params = [Params(30, 4, ignore_eos=True, trace=tuple(draw.randint(1, 4) for _ in range(40))) for _ in prompts]

    def run(width: int, measured: bool) -> tuple[list, Counter[int], Counter[int]]:
        engine = Engine(
            build(), max_num_seqs=8, max_model_len=64, kv_policy="last-exited", passes_per_step=50, max_lanes=width
        )
        if measured:
            engine.loop.schedule.costs = Costs({1: 1.0, 8: 1.0}, {1: 0.0, 8: 0.0})  # read-outs are free
        done = engine.generate(prompts, params)
        counts = engine.loop.counts
        return [(c.tokens, c.depths) for c in done], counts.passes, counts.reads

    whole, _, _ = run(0, False)
    plain, passes, reads = run(3, False)
    waiting, same_passes, fewer = run(3, True)
    assert whole == plain == waiting
    assert same_passes.total() <= passes.total()
    assert same_passes[3] >= 0.9 * passes[3]
    assert fewer.total() < 0.6 * reads.total()
    assert max(fewer) >= 6
