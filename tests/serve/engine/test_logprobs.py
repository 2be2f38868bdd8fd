"""Log-probabilities by the device: those of a forward of the model, whichever decoder and tick gave the tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loopwise.errors import UserError
from loopwise.serve import Engine, Params
from tests.helpers.engines import build, requests
from tests.helpers.graph_ticks import run_once

WAVE: dict[str, Any] = {"decoder": "wave", "max_in_flight": "auto", "draft_every": 2}


def engine(graphs: bool, **options: Any) -> Engine:
    made = Engine(
        build(), max_num_seqs=3, max_model_len=64, passes_per_step=5, max_in_flight=4, cuda_graphs=False, **options
    )
    if graphs:
        made.loop.use_graphs(run_once)
    return made


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("more", [{}, WAVE], ids=["plain", "wave"])
def test_they_are_those_of_a_forward_of_the_model(more, graphs):
    params = [Params(11, 4, temperature=n / 2, seed=n, ignore_eos=True, logprobs=n, **more) for n in range(4)]
    prompts, model, ranks = [[5, 6 + n, 7] for n in range(4)], build(), set[int]()
    for prompt, p, done in zip(prompts, params, engine(graphs).generate(prompts, params), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + done.tokens]), num_recurrences=4).logits[0, len(prompt) - 1 : -1]
        want = logits.float().log_softmax(-1)
        assert [each.token for each in done.logprobs] == done.tokens
        for row, each in zip(want, done.logprobs, strict=True):
            assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-4)
            ranks.add(each.rank)
            assert each.rank == 1 + int((row > row[each.token]).sum())
            top = row.topk(p.logprobs or 0) if p.logprobs else None
            assert list(each.top) == (top.indices.tolist() if top else [])
            assert list(each.top.values()) == pytest.approx(top.values.tolist() if top else [], abs=1e-4)
    assert max(ranks) > 1


def test_exits_preemption_of_steps_and_neighbors_without():
    """A token's values come of the read-out that gave it, at its own depth; drafts that were dropped leave none."""
    prompts, params = requests(41, 6, "last-exited", ["fixed", "latent-diff", "kl"])
    params = [replace(p, logprobs=2 if n % 3 else None, max_tokens=12) for n, p in enumerate(params)]
    waves = [replace(p, decoder="wave", max_in_flight=4, draft_every=n % 3 + 1) for n, p in enumerate(params)]
    want = engine(False, kv_policy="last-exited").generate(prompts, params)
    for graphs in (False, True):
        got = engine(graphs, kv_policy="last-exited").generate(prompts, waves)
        for p, a, b in zip(params, want, got, strict=True):
            assert (a.tokens, a.depths, len(b.logprobs)) == (b.tokens, b.depths, 0 if p.logprobs is None else 12)
            assert [each.rank for each in a.logprobs] == [each.rank for each in b.logprobs]
            left, right = ([each.logprob for each in done.logprobs] for done in (a, b))
            assert left == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize("value", [-1, 21, 1.0, True])
def test_numbers_out_of_range_are_refused(value):
    with pytest.raises(UserError, match="an integer from 0 to 20"):
        engine(False).generate([[5]], Params(logprobs=value))
    with pytest.raises(UserError, match="a token has no log-probability"):
        engine(False).generate([[5]], Params(logprobs=1, decoder="diffusion", max_in_flight=4))


def test_their_memory_is_counted_before_a_request_asks():
    made = engine(False)
    records, counted = made.loop.context.logprobs, made.loop.nbytes
    made.generate([[5]], Params(1, 1, logprobs=1))
    held = records.ids.nbytes + records.values.nbytes + records.ranks.nbytes
    assert records.nbytes == held > 0
    assert made.loop.nbytes == counted >= made.loop.state.nbytes + held


def test_a_prompt_in_several_steps_has_none_until_its_token():
    made = engine(False, max_num_batched_tokens=4)
    prompts, params = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6]], Params(3, 4, ignore_eos=True, logprobs=1)
    got, want = made.generate(prompts, params), engine(False).generate(prompts, params)
    assert [(done.tokens, len(done.logprobs)) for done in got] == [(done.tokens, 3) for done in want]
