"""The offline engine: its settings, its requests, its completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loopwise.errors import UserError
from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.serve import Engine, Params
from loopwise.serve.engine.costs import Costs
from loopwise.serve.engine.loop import Loop
from tests.helpers.engines import build
from tests.helpers.tiny import VOCAB, source_config, tokenizer


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": -1}, "max_tokens=-1: an integer of 0 or more"),
        ({"num_recurrences": 0}, "num_recurrences=0: an integer of 1 or more"),
        ({"num_recurrences": "3"}, "num_recurrences='3': an integer"),
        ({"temperature": -1.0}, "temperature=-1.0: a number of 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan: a number of 0 or more"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0: a number above 0, up to 1"),
        ({"exit_threshold": 0.1}, "exit_threshold=0.1: exit_rule='fixed' has no threshold"),
        ({"temperature": "1"}, "temperature='1': a number"),
        ({"top_k": 1.0}, "top_k=1.0: an integer of 0 or more; -1: all"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: a number above 0"),
        ({"presence_penalty": 3.0}, "presence_penalty=3.0: a number from -2 to 2"),
        ({"frequency_penalty": True}, "frequency_penalty=True: a number from -2 to 2"),
        ({"seed": 1.0}, "seed=1.0: an integer"),
        ({"trace": (1, "2")}, "trace: '2' in it is no integer"),
        ({"stop_token_ids": tuple(range(17))}, "stop_token_ids: 17 tokens that stop"),
        ({"decoder": "wave"}, "max_in_flight=8: the engine was started with max_in_flight=1"),
        ({"decoder": "diffusion", "max_in_flight": "auto"}, "max_in_flight='auto': decoder='diffusion' needs a number"),
        ({"decoder": "wave", "max_in_flight": "wide"}, "max_in_flight='wide': an integer of 1 or more"),
        ({"draft_every": 2}, "draft_every=2: belongs to decoder='wave', and the decoder is 'plain'"),
        ({"decoder": "wave", "draft_every": 99}, "draft_every=99: an integer from 1 to 8"),
        ({"decoder": "wave", "draft_depths": (3, 2)}, "draft_depths=.*: a list of depths from 1 to 8"),
        ({"decoder": "diffusion", "exit_rule": "cosine"}, "exit_rule='cosine': decoder='diffusion' freezes"),
        ({"decoder": "diffusion", "exit_threshold": 0.0}, "exit_threshold=0.0: decoder='diffusion' freezes"),
        ({"decoder": "diffusion", "prompt_exit": True}, "prompt_exit=True: decoder='diffusion' freezes"),
    ],
)
def test_params_out_of_range_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Engine(build(), max_num_seqs=1, max_model_len=50).generate([[5]], Params(**wrong))


def test_thresholds_and_traces_beyond_all_bounds():
    engine = Engine(build(), max_num_seqs=1, max_model_len=50)
    with pytest.raises(UserError, match="exit_threshold=1e\\+300: a finite number"):
        engine.generate([[5]], Params(3, 4, exit_rule="kl", exit_threshold=1e300))
    assert engine.generate([[5]], Params(3, 4, ignore_eos=True, trace=(2,) * 9999))[0].depths == [2, 2, 2]


@pytest.mark.parametrize(("prompts", "params"), [("hello", None), ([["a"]], None), ([5], None), ([[5]], {"seed": 1})])
def test_prompts_and_params_of_other_types_are_refused(prompts, params):
    with pytest.raises(UserError, match=r"prompts='hello': a list|a prompt .* or a list of token ids|is no Params"):
        Engine(build(), max_num_seqs=1, max_model_len=50).generate(prompts, params)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_that_the_model_lacks_are_refused(token):
    with pytest.raises(UserError, match=f"token id {token} in a prompt: the model has 0 to {VOCAB - 1}"):
        Engine(build(), max_num_seqs=1, max_model_len=50).generate([[5], [5, token]])


@pytest.mark.parametrize(
    "name", ["max_num_seqs", "max_model_len", "passes_per_step", "max_recurrences", "max_num_batched_tokens"]
)
def test_settings_out_of_range_are_refused(name):
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(UserError, match=f"{name}=0: an integer of 1 or more"):
        Engine(build(), **wrong)


def test_a_width_below_a_request_is_refused():
    with pytest.raises(UserError, match="max_lanes=1: kv_policy=per-depth has up to"):
        Engine(build(), max_lanes=1, kv_policy="per-depth")


def test_waves_fill_a_pass_up_to_the_budget(monkeypatch):
    """Two lanes leave two waves nothing but their certain positions, so they take as many passes as plain decoding."""
    plain, prompts = Params(9, 4, ignore_eos=True), [[5, 6, 7], [8, 9]]
    wave = replace(plain, decoder="wave", max_in_flight=4)
    sizes: dict[str, Any] = {"max_num_seqs": 2, "max_model_len": 40, "max_in_flight": 4}
    want = Engine(build(), **sizes).generate(prompts, plain)
    measured = Costs({1: 1.0, 2: 1.4, 3: 9.0}, {1: 0.0, 2: 0.0, 3: 0.0})
    monkeypatch.setattr(Loop, "measure", lambda loop: measured)
    for narrow in (2, "auto"):
        engine = Engine(build(), budget=narrow, **sizes)
        assert (engine.loop.eager_tick.budget, engine.loop.schedule.costs) == (2, None)
        assert engine.generate(prompts, wave) == want
    wide = Engine(build(), coda_wait="auto", **sizes)
    assert (wide.loop.eager_tick.budget, wide.loop.schedule.costs) == (0, measured)
    assert sum(done.items for done in wide.generate(prompts, wave)) > sum(done.items for done in want)
    with pytest.raises(UserError, match="budget=-2: an integer of 0 or more"):
        Engine(build(), budget=-2)


def test_finish_reasons():
    engine = Engine(build(), max_num_seqs=2, max_model_len=20)
    long, short = engine.generate([[5, 6]] * 2, [Params(99, ignore_eos=True), Params(3, ignore_eos=True)])
    assert [(len(long.tokens), long.finish_reason), (len(short.tokens), short.finish_reason)] == [
        (19, "length"),
        (3, "length"),
    ]
    (stopped,) = engine.generate([[5, 6]], Params(99, ignore_eos=True, stop_token_ids=(long.tokens[4],)))
    assert (stopped.tokens, stopped.finish_reason) == (long.tokens[: long.tokens.index(long.tokens[4]) + 1], "stop")
    many = build().config.max_position_embeddings
    assert (
        Engine(build(), max_num_seqs=1, max_model_len=many).max_model_len
        == Engine(build(), max_num_seqs=1).max_model_len
        == min(many, 1024)
    )
    with pytest.raises(UserError, match=f"max_model_len={many + 1}: this model has {many} positions"):
        Engine(build(), max_num_seqs=1, max_model_len=many + 1)


def test_a_text_ends_at_a_stop_of_several_tokens():
    """Beside a request that goes on; with decoders that have several tokens in flight, too."""
    known = tokenizer()
    engine = Engine(build(), max_num_seqs=2, max_model_len=60, max_in_flight=3, tokenizer=known)
    whole = Params(40, ignore_eos=True, temperature=1.0, seed=3)
    prompt = known("def f").input_ids
    (long,) = engine.generate([prompt], whole)
    before, stop = (str(known.decode(long.tokens[a:b])) for a, b in ((0, 9), (9, 11)))
    assert stop not in before
    for more in ({}, {"decoder": "wave", "max_in_flight": 3}):
        two = [replace(whole, stop=("never in it", stop), **more), replace(whole, **more)]
        stopped, other = engine.generate([prompt] * 2, two)
        assert (stopped.tokens, stopped.text, stopped.finish_reason) == (long.tokens[:11], before, "stop")
        assert stopped.depths == long.depths[:11]
        assert other.tokens == long.tokens
    for wrong in ("ab", ("",), (3,)):
        with pytest.raises(UserError, match="a tuple of texts, none of them empty"):
            engine.generate([prompt], Params(stop=wrong))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="stop: texts to stop at need the model's tokenizer"):
        Engine(build(), max_num_seqs=1, max_model_len=60).generate([prompt], Params(stop=("a",)))


def test_an_interrupted_call_leaves_nothing():
    engine = Engine(
        build(), max_num_seqs=2, max_model_len=60, passes_per_step=4, max_in_flight=3, kv_policy="last-exited"
    )
    prompts, params = (
        [[5] * 30, [6, 7]],
        Params(20, 4, ignore_eos=True, decoder="wave", max_in_flight=3, temperature=1.0),
    )
    want = engine.generate(prompts, params)
    step, calls = engine.loop.step, []

    def interrupted(live: torch.Tensor) -> None:
        calls.append(step(live))
        if len(calls) == 2:
            raise KeyboardInterrupt

    engine.loop.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, params)
    assert not engine.loop.work.in_use
    assert engine.generate(prompts, params) == want


def test_a_layer_with_a_mask_of_its_own_is_refused():
    """Doge's attention adds a learned bias, which it keeps in its mask."""
    with pytest.raises(UserError, match="DogeAttention gives attention a mask of its own"):
        Engine(build("doge"), max_num_seqs=1, max_model_len=32)


def test_layers_that_count_positions_are_refused():
    config = source_config("llama4_text", layer_types=["full_attention"] * 6)
    model = RecurrentDepthForCausalLM(RecurrentDepthConfig(source_config=config, core=[1, 2], prelude=[0], coda=[3]))
    with pytest.raises(UserError, match="its layers count the positions of a call"):
        Engine(model, max_num_seqs=1, max_model_len=32)
