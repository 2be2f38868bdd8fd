"""The engine's tokens and depths equal those of one request at a time, whatever else is in flight."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from loopwise.errors import UserError
from loopwise.model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from loopwise.model.configuration_recurrent_depth import EXIT_RULES
from loopwise.serve import Engine, Params
from loopwise.serve.engine import exits, passes
from loopwise.serve.engine.compile import compiled
from loopwise.serve.engine.diffusion_settings import DiffusionSettings
from loopwise.serve.engine.exits import RULES
from loopwise.serve.engine.loop import Prompt
from loopwise.serve.engine.tick import TickReport
from loopwise.serve.engine.transitions.steps import choose, enter
from tests.helpers.model import RELAXED_PARTS, build_relaxed
from tests.helpers.oracle import Answer, Oracle
from tests.helpers.tiny import VOCAB, source_config

NEAR = 1e-4


def build(model_type: str = "llama", **fields: Any) -> Any:
    """A tiny model of random weights, with states that move enough at every depth."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"prelude": [0], "core": [1, 2], "coda": [3], "num_recurrences": 4, "injection": "linear"}
    config = RecurrentDepthConfig(source_config=source_config(model_type), **{**options, **fields})
    model = RecurrentDepthForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def requests(
    seed: int, count: int, policy: str, rules: list[str], depth: int = 4
) -> tuple[list[list[int]], list[Params]]:
    """Prompts of mixed length, and what is asked of each."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(draw.choice((1, 3, 9, 17, 30)))] for _ in range(count)]
    params = []
    for prompt in prompts:
        rule = draw.choice(rules)
        limit = draw.randint(1, depth)
        likely = {"latent-diff": 0.7, "cosine": 0.3, "entropy-diff": 0.1, "kl": 0.3, "minp-kl": 0.3, "gate": 0.6}
        threshold = {**likely, "argmax-stability": 1.0, "fixed": 0.0}[rule] * draw.uniform(0.5, 1.5) or None
        forced = rule == "fixed" and draw.random() < 0.7
        params.append(
            Params(
                max_tokens=draw.randint(1, 20),
                num_recurrences=limit,
                min_recurrences=draw.randint(1, limit),
                exit_rule=rule,
                exit_threshold=1.0 if rule == "argmax-stability" else threshold,
                prompt_exit=policy != "per-depth" and RULES[rule].reads != "logits" and draw.random() < 0.5,
                trace=tuple(draw.randint(1, limit) for _ in range(len(prompt) + 20)) if forced else (),
                ignore_eos=True,
            )
        )
    return prompts, params


def test_prompts_that_exit_are_the_same_in_chunks():
    """With a coda, rules that read logits cannot end prompt positions: what they read depends on where a prompt is cut.
    Policies that overwrite slots never cut it."""
    draw = random.Random(0)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(60)] for _ in range(4)]
    for rule, threshold in (("latent-diff", 0.7), ("cosine", 0.3), ("kl", 0.3), ("argmax-stability", 1.0)):
        for coda in ([], [3]):

            def engine(policy: str, lanes: int, coda: list[int] = coda) -> Engine:
                model = build(coda=coda)
                return Engine(model, rows=2, length=80, kv_policy=policy, prompt_lanes=lanes)

            params = Params(6, 4, exit_rule=rule, exit_threshold=threshold, prompt_exit=True, ignore_eos=True)
            engines = [engine("last-exited", lanes) for lanes in (16, 200)]
            if coda and RULES[rule].reads == "logits":
                for one in engines:
                    with pytest.raises(UserError, match=f"{rule}.*choose from fixed, latent-diff, cosine, gate"):
                        one.generate(prompts, params)
                engine("single", 200).generate(prompts[:1], params)
                continue
            cut, whole = (one.generate(prompts, params) for one in engines)
            assert [(c.tokens, c.depths) for c in cut] == [(c.tokens, c.depths) for c in whole], (rule, coda)


def check(model: Any, policy: str, prompts: list, params: list[Params], **options: Any) -> list[Answer]:
    """Every request that is no near-tie has the oracle's tokens and depths; most are none, and exits vary."""
    oracle = Oracle(model, policy)
    want = [oracle.generate(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    engine = Engine(model, rows=5, length=100, kv_policy=policy, ticks=3, prompt_lanes=40, **options)
    got = engine.generate(prompts, params)
    clear = [n for n, answer in enumerate(want) if answer.margin > NEAR]
    assert len(clear) >= 0.9 * len(want)
    for n in clear:
        assert (got[n].tokens, got[n].depths) == (want[n].tokens, want[n].depths), (n, params[n])
    return want


@pytest.mark.parametrize("policy", ["per-depth", "last-exited", "single", "first", "modulo-2"])
def test_every_policy_with_forced_depths_and_rules(policy):
    cheap = ["fixed", "latent-diff", "cosine"]
    want = check(build(), policy, *requests(1, 24, policy, cheap))
    assert {depth for answer in want for depth in answer.depths} == {1, 2, 3, 4}


@pytest.mark.parametrize(("policy", "width"), [("per-depth", 8), ("single", 3)])
def test_a_compiled_tick_narrower_than_the_lanes(policy, width):
    check(build(), policy, *requests(7, 16, policy, ["fixed", "latent-diff"]), compile=True, width=width)


@pytest.mark.parametrize("rule", [name for name in RULES if name not in ("fixed", "gate")])
def test_every_rule(rule):
    want = check(build(), "last-exited", *requests(2, 12, "last-exited", [rule]))
    assert len({depth for answer in want for depth in answer.depths}) > 1


@pytest.mark.parametrize(("policy", "rules"), [("per-depth", ["kl", "minp-kl"]), ("last-exited", [*RULES][4:])])
def test_logits_of_many_lanes_are_looked_at_in_parts(policy, rules, monkeypatch):
    """And the distributions that are kept are one a request, not one a lane; none, where no rule compares any."""
    monkeypatch.setattr(exits, "CHUNK", 3)
    model = build(core=[1, 2, 3], coda=[])
    prompts, params = requests(5, 12, policy, rules)
    params = [replace(p, prompt_exit=policy != "per-depth") for p in params]
    check(model, policy, prompts, params)
    engine = Engine(model, rows=12, length=100, kv_policy=policy)
    for rule in ("argmax-stability", "kl"):
        assert not len(engine.loop.rules.by_logits.log_p)
        engine.generate(prompts, [replace(p, exit_rule=rule, exit_threshold=None, prompt_exit=False) for p in params])
    assert 0 < len(engine.loop.rules.by_logits.log_p) <= 12


@pytest.mark.parametrize("policy", ["per-depth", "last-exited"])
def test_the_exit_gate_with_the_norm_between_recurrences(policy):
    model = build(prelude=[], core=[0, 1, 2], coda=[], injection="none", recurrence_norm="between", exit_gate=True)
    want = check(model, policy, *requests(3, 12, policy, ["gate"]))
    assert len({depth for answer in want for depth in answer.depths}) > 1


# The rows of a norm of heads: in one family they come before the heads, in the other behind them.
OF_HEADS = {"depths": 3, "rank": {"self_attn.q_proj": 4}, "own": ["self_attn.q_norm.weight"], "dora": False}


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gemma3_text", {}),
        ("mistral", {}),
        ("gpt2", {}),
        ("gpt_neox", {"recurrence_norm": "each"}),
        ("olmo2", {"recurrence_norm": "last", "state_init": "normal", "state_std": 0.5}),
        ("qwen3_moe", {"injection": "add", "state_init": "zeros"}),
        ("gpt_oss", {"injection": "none"}),
        *((family, {"relaxation": OF_HEADS}) for family in ("qwen3", "gemma3_text")),
        ("qwen2", {"relaxation": {**OF_HEADS, "own": ["self_attn.q_proj.bias"], "dora": True}}),
    ],
)
def test_architectures(model_type, fields):
    check(build(model_type, **fields), "last-exited", *requests(4, 10, "last-exited", ["fixed", "latent-diff"]))


@pytest.mark.parametrize("model_type", list(RELAXED_PARTS))
@pytest.mark.parametrize(("dora", "prompts"), [(False, 4), (True, 4), (False, 1000)])
def test_relaxation_at_mixed_depths(model_type, dora, prompts, monkeypatch):
    """Also where prompts, from so many lanes on, pass on their own."""
    monkeypatch.setattr(passes, "PROMPT", prompts)
    model = build_relaxed(model_type, depths=3, dora=dora, num_recurrences=4)
    model.get_output_embeddings().weight.data *= 8  # fewer near-ties
    check(model, "last-exited", *requests(8, 12, "last-exited", ["fixed", "latent-diff"]))


@pytest.mark.parametrize("options", [{"width": 8}, {"coda_wait": 4}, {"width": 8, "coda_wait": 3}])
@pytest.mark.parametrize("policy", ["per-depth", "last-exited"])
def test_limits_of_a_pass_change_nothing(policy, options):
    check(build(), policy, *requests(6, 16, policy, ["fixed", "latent-diff"]), **options)


@torch.inference_mode()
def test_rows_take_turns():
    """As many lanes as a pass has room for, one a row, from where the pass before has ended; the others behind them."""
    taken = Engine(build(), rows=7, length=50, width=3, wave=4, kv_policy="last-exited").loop.state
    lanes, live, draw, turn = taken.lanes, taken.requests.live, random.Random(0), 0
    for _ in range(200):
        lanes.running[: taken.num_decode_lanes] = False
        live[:7] = torch.tensor([draw.random() < 0.8 for _ in range(7)])
        running = [row * taken.ring + draw.randrange(taken.ring) for row in range(7) if draw.random() < 0.7]
        waiting = [lane for lane in range(taken.num_decode_lanes) if draw.random() < 0.1]
        lanes.running[running], lanes.waiting[: taken.num_decode_lanes] = True, False
        lanes.waiting[waiting] = True
        runs, waits = ([n for n in some if live[n // taken.ring]] for some in (running, waiting))
        first = [n for n in runs if n // taken.ring >= turn] + [n for n in runs if n // taken.ring < turn]
        choose(taken)  # for a pass that does not come about, which costs nobody a turn
        order, counts = choose(taken)
        assert (order[: len(runs)].tolist(), counts.tolist()) == (first, [len(waits), len(runs)])
        if first:
            enter(taken, order[: min(len(runs), 3)])
            turn = first[2] // taken.ring + 1 if len(first) > 3 else turn


@pytest.mark.parametrize("policy", ["per-depth", "last-exited"])
@pytest.mark.parametrize("width", [0, 10])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wave_gives_the_tokens_of_plain_decoding(policy, width, temperature):
    rules = ["fixed", "latent-diff", "cosine", "kl"]
    prompts, params = requests(9, 24, policy, rules)
    params = [replace(p, temperature=temperature, seed=n, max_tokens=20) for n, p in enumerate(params)]
    waves = [replace(p, decoder="wave", wave=n % 7 + 1) if n % 4 else p for n, p in enumerate(params)]
    plain = Engine(build(), rows=5, length=100, kv_policy=policy).generate(prompts, params)
    engine = Engine(build(), rows=5, length=100, kv_policy=policy, ticks=3, wave=7, width=width)
    got = engine.generate(prompts, waves)
    assert [(c.tokens, c.depths) for c in got] == [(c.tokens, c.depths) for c in plain]
    if not width:
        assert sum(c.passes for c in got) < sum(c.passes for c in plain)
    assert all(c.items >= sum(c.depths[1:]) for c in got)


@pytest.mark.parametrize("policy", ["last-exited", "single", "first", "modulo-2"])
def test_transformers_generate_follows_the_policy(policy):
    """At full depth, with prompts of one chunk; left padding, too."""
    model = build(kv_policy=policy)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    prompts, _ = requests(12, 6, policy, ["fixed"])
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    want = model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()
    got = Engine(model, rows=3, length=100).generate(prompts, Params(10, ignore_eos=True))
    assert [c.tokens for c in got] == want


def test_the_config_names_the_engines_rules():
    assert tuple(RULES) == EXIT_RULES


ROUTERS = {
    "expert": {"kind": "expert", "thresholds": [0.35, 0.5, 0.5], "alpha": 0.7},
    "expert, auxiliary": {"kind": "expert", "thresholds": [0.35, 0.5, 0.5], "auxiliary": True, "network": "mlp"},
    "expert, first": {"kind": "expert", "thresholds": [0.5, 0.5, 0.5], "alpha": 0.7, "kv": "first-recursion"},
    "token": {"kind": "token"},
    "token, first": {"kind": "token", "kv": "first-recursion", "gate": "sigmoid", "network": "mlp"},
}


@pytest.mark.parametrize("kind", list(ROUTERS))
def test_a_routed_model_equals_transformers_and_saves_work(kind):
    model = build(num_recurrences=3, max_recurrences=3, injection="none", router=ROUTERS[kind])
    with torch.no_grad():
        for name, parameter in model.router.named_parameters():
            parameter *= 3 if "networks" in name or "auxiliary" in name else 1
    prompts, _ = requests(13, 8, "per-depth", ["fixed"])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    want = [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]
    engine = Engine(model, rows=3, length=100, ticks=3, prompt_lanes=20)
    got = engine.generate(prompts, Params(12, ignore_eos=True))
    assert [c.tokens for c in got] == want
    depths = {depth for c in got for depth in c.depths}
    assert len(depths) > 1
    full = sum(len(prompt) + 11 for prompt in prompts) * 3
    assert sum(n * times for n, times in engine.loop.counts.passes.items()) < full


REFINED = [
    DiffusionSettings(inner=2, threshold=0.3),
    DiffusionSettings(inner=3, headway=2, ema=0.0, threshold=0.2),
    DiffusionSettings(inner=2, freeze="acceleration", threshold=0.4),
    DiffusionSettings(inner=2, freeze="token-stability"),
    DiffusionSettings(inner=2, freeze="fixed", headway=2),
    DiffusionSettings(inner=4, threshold=0.3, continuous=True),
]


RELAXED = {"depths": 4, "rank": {"self_attn.q_proj": 8, "mlp.down_proj": 8}, "own": ["input_layernorm.weight"]}
SHAPES = {
    "input": {"state_init": "input"},
    "normal": {"state_init": "normal", "state_std": 0.3},
    "relaxed": {"relaxation": {**RELAXED, "dora": False}, "recurrence_norm": "between"},
    "normed": {"relaxation": {**RELAXED, "dora": True}, "recurrence_norm": "each"},
}


@pytest.mark.parametrize("policy", ["per-depth", "single", "modulo-2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_diffusion_is_that_of_a_request_alone(policy, shape):
    """With plain requests and waves beside it, in passes that do not hold all of them."""
    model = build(**SHAPES[shape])
    with torch.no_grad():  # a contraction, which converges
        model.injection.weight[:, :64] *= 0.2
    draw = random.Random(11)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(draw.choice((1, 4, 9)))] for _ in range(7)]
    params = [
        Params(10, 8, ignore_eos=True, decoder="diffusion", diffusion=REFINED[n % len(REFINED)])
        for n in range(len(prompts))
    ]
    oracle = Oracle(model, policy)
    want = [oracle.diffuse(prompt, p, 6).tokens for prompt, p in zip(prompts, params, strict=True)]
    others = [replace(p, decoder="plain") for p in params]
    plain = [oracle.generate(prompt, p) for prompt, p in zip(prompts, others, strict=True)]
    assert any(tokens != answer.tokens for tokens, answer in zip(want, plain, strict=True))
    engine = Engine(model, rows=5, length=100, kv_policy=policy, ticks=3, wave=6, width=13)
    got = engine.generate(
        [p for p in prompts for _ in "ab"], [p for pair in zip(params, others, strict=True) for p in pair]
    )
    assert [c.tokens for c in got[::2]] == want
    assert [c.tokens for n, c in enumerate(got[1::2]) if plain[n].margin > NEAR] == [
        answer.tokens for answer in plain if answer.margin > NEAR
    ]


def test_a_step_holds_whatever_a_diffusion_freezes_in_it():
    engine = Engine(build(), rows=2, length=100, ticks=3, wave=40, kv_policy="single")
    leap = DiffusionSettings(inner=1, headway=20, threshold=1e9)  # all converges at once
    params = Params(60, 4, ignore_eos=True, decoder="diffusion", diffusion=leap)
    assert len(engine.generate([[5, 6, 7]], params)[0].tokens) == 60


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"freeze": "latent-dif"}, "choose from latent-diff"),
        ({"inner": 0}, "at least 1"),
        ({"ema": 1.5}, "from 0 to 1"),
    ],
)
def test_a_diffusion_that_makes_no_sense_is_refused(wrong, told):
    engine = Engine(build(), rows=1, length=50, wave=4)
    with pytest.raises(UserError, match=told):
        engine.generate([[5]], Params(3, 4, decoder="diffusion", diffusion=DiffusionSettings(**wrong)))


def test_thresholds_and_traces_beyond_all_bounds():
    engine = Engine(build(), rows=1, length=50)
    with pytest.raises(UserError, match="exit_threshold=1e\\+300: a finite number"):
        engine.generate([[5]], Params(3, 4, exit_rule="kl", exit_threshold=1e300))
    assert engine.generate([[5]], Params(3, 4, ignore_eos=True, trace=(2,) * 9999))[0].depths == [2, 2, 2]


@pytest.mark.parametrize(
    ("wrong", "told"),
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
        ({"decoder": "wave"}, "wave=8: the engine was started with wave=1"),
        ({"decoder": "diffusion", "exit_rule": "cosine"}, "exit_rule='cosine': decoder='diffusion' freezes"),
        ({"decoder": "diffusion", "exit_threshold": 0.0}, "exit_threshold=0.0: decoder='diffusion' freezes"),
        ({"decoder": "diffusion", "prompt_exit": True}, "prompt_exit=True: decoder='diffusion' freezes"),
    ],
)
def test_params_out_of_range_are_refused(wrong, told):
    with pytest.raises(UserError, match=told):
        Engine(build(), rows=1, length=50).generate([[5]], Params(**wrong))


@pytest.mark.parametrize(("prompts", "params"), [("hello", None), ([["a"]], None), ([5], None), ([[5]], {"seed": 1})])
def test_what_is_no_prompt_and_no_params_is_refused(prompts, params):
    with pytest.raises(UserError, match=r"prompts='hello': a list|a prompt .* or a list of token ids|is no Params"):
        Engine(build(), rows=1, length=50).generate(prompts, params)


def test_what_ends_a_text_is_said():
    engine = Engine(build(), rows=2, length=20)
    long, short = engine.generate([[5, 6]] * 2, [Params(99, ignore_eos=True), Params(3, ignore_eos=True)])
    assert [(len(long.tokens), long.finish_reason), (len(short.tokens), short.finish_reason)] == [
        (19, "length"),
        (3, "length"),
    ]
    (stopped,) = engine.generate([[5, 6]], Params(99, ignore_eos=True, stop_token_ids=(long.tokens[4],)))
    assert (stopped.tokens, stopped.finish_reason) == (long.tokens[: long.tokens.index(long.tokens[4]) + 1], "stop")
    many = build().config.max_position_embeddings
    assert Engine(build(), rows=1, length=many).length == Engine(build(), rows=1).length == min(many, 1024)
    with pytest.raises(UserError, match=f"length={many + 1}: this model has {many} positions"):
        Engine(build(), rows=1, length=many + 1)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_that_the_model_lacks_are_refused(token):
    with pytest.raises(UserError, match=f"token id {token} in a prompt: the model has 0 to {VOCAB - 1}"):
        Engine(build(), rows=1, length=50).generate([[5], [5, token]])


@pytest.mark.parametrize("name", ["rows", "length", "ticks", "max_recurrences", "prompt_lanes"])
def test_settings_out_of_range_are_refused(name):
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(UserError, match=f"{name}=0: an integer of 1 or more"):
        Engine(build(), **wrong)


def test_a_width_below_a_request_is_refused():
    with pytest.raises(UserError, match="width=1: kv_policy=per-depth has up to"):
        Engine(build(), width=1, kv_policy="per-depth")


def test_noise_of_a_diffusion_is_its_seeds_alone():
    model = build()
    base = Params(
        12, 8, ignore_eos=True, decoder="diffusion", diffusion=DiffusionSettings(inner=2, threshold=0.3, noise=0.5)
    )
    engine = Engine(model, rows=3, length=100, kv_policy="single", ticks=3, wave=6)
    params = [replace(base, diffusion=replace(base.diffusion, seed=n)) for n in range(4)]
    together = engine.generate([[5, 6, 7]] * 4, params)
    assert [engine.generate([[5, 6, 7]], p)[0].tokens for p in params] == [c.tokens for c in together]
    assert len({tuple(c.tokens) for c in together}) > 1


def test_no_tokens_are_none():
    """Whatever else runs; and a prompt that is longer than a step has lanes for is left alone, too."""
    engine = Engine(build(), rows=3, length=60, ticks=4, kv_policy="last-exited", prompt_lanes=8)
    params = [Params(tokens, 4, ignore_eos=True) for tokens in (30, 0, 0)]
    got = engine.generate([[5, 6], [7] * 3, [5] * 30], params)
    assert [len(done.tokens) for done in got] == [30, 0, 0]


def test_what_breaks_off_leaves_nothing():
    engine = Engine(build(), rows=2, length=60, ticks=4, wave=3, kv_policy="last-exited")
    prompts, params = [[5] * 30, [6, 7]], Params(20, 4, ignore_eos=True, decoder="wave", wave=3, temperature=1.0)
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


@pytest.mark.parametrize("masked", [False, True])
def test_a_step_ends_when_somebody_waits(masked):
    """Or, where places are wanted, when a request ends; tokens are the same, and prompts run to their end."""
    engine = Engine(build(), rows=6, length=100, ticks=40, kv_policy="last-exited", cuda_graphs=False)
    if masked:
        with torch.inference_mode():
            engine._record(lambda run: run)
    prompts, params = requests(12, 6, "last-exited", ["fixed", "latent-diff"])
    params = [replace(p, max_tokens=12, num_recurrences=4, min_recurrences=2) for p in params]
    steps, tick, draw = [], engine.loop.tick, random.Random(1)

    def step(live: torch.Tensor) -> None:
        steps.append(0)
        type(engine.loop).step(engine.loop, live)

    def counted(max_passes: int) -> TickReport:
        report = tick(max_passes)
        steps[-1] += report.passes
        return report

    engine.loop.step, engine.loop.tick = step, counted
    want = engine.generate(prompts, params)
    assert len(steps) <= 3
    engine.loop.somebody_waits = lambda: True
    assert engine.generate(prompts, params) == want
    assert len(steps) > 10
    assert max(steps[-9:]) <= 4  # passes that run back to back; a prompt's are 4
    steps.clear()
    engine.loop.somebody_waits = lambda: draw.random() < 0.5
    assert engine.generate(prompts, params) == want
    assert len(steps) > 4
    engine.loop.somebody_waits, params[0] = None, replace(params[0], max_tokens=2)
    steps.clear()
    engine.rows, engine.loop.eager = 2, False
    short = engine.generate(prompts[:3], params[:3])  # the third waits for the place of the first
    assert short[1:] == want[1:3]
    assert steps[0] < 20


def test_seeds_of_any_size():
    engine = Engine(build(), rows=2, length=60)
    seeds = (5, (1 << 64) + 5, 1 << 63, -(1 << 63))
    same, again, high, low = (
        engine.generate([[5, 6]], Params(9, temperature=1.0, seed=seed, ignore_eos=True))[0].tokens for seed in seeds
    )
    assert same == again
    assert high == low != same


@pytest.mark.parametrize("temperature", [1e-5, 1e-307, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest(temperature):
    engine = Engine(build(), rows=2, length=60)
    greedy = Params(9, ignore_eos=True)
    assert engine.generate([[5, 6]], replace(greedy, temperature=temperature)) == engine.generate([[5, 6]], greedy)


def test_sampling_is_the_seeds_alone():
    prompts, params = requests(7, 8, "last-exited", ["latent-diff"])
    params = [replace(p, temperature=1.0, top_p=0.9, top_k=50, seed=n, max_tokens=12) for n, p in enumerate(params)]
    engine = Engine(build(), rows=3, length=100, kv_policy="last-exited", ticks=3)
    together = engine.generate(prompts, params)
    for n, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        assert engine.generate([prompt], p)[0] == together[n]
    again = engine.generate(prompts[:1], replace(params[0], seed=99))
    assert again[0].tokens != together[0].tokens


def test_what_is_compiled_with_autograd_on_is_refused():
    with pytest.raises(AssertionError, match="autograd"):
        compiled(lambda owner, x: x + 1)(None, torch.zeros(3))


@pytest.mark.parametrize("rule", ["entropy-diff", "kl"])
def test_a_request_goes_on_after_others_had_its_blocks(rule):
    """A rule that reads through a coda finds that of the positions before, also for the first token that comes anew."""
    prompts, params = requests(11, 12, "last-exited", [rule])
    model = build(prelude=[0], core=[1], coda=[2, 3])
    some = {"max_tokens": 20, "num_recurrences": 4, "min_recurrences": 1, "ignore_eos": True}
    params, oracle = [replace(asked, **some) for asked in params], Oracle(model, "last-exited")
    wanted = [oracle.generate(prompt, asked) for prompt, asked in zip(prompts, params, strict=True)]
    engine = Engine(model, rows=1, length=100, kv_policy="last-exited", ticks=3)
    loop, row, preempted = engine.loop, torch.zeros(1, dtype=torch.long), 0
    caches: Any = vars(loop.forward.attention)["caches"]
    for prompt, asked, want in zip(prompts, params, wanted, strict=True):
        request, tokens = engine.request(asked), []
        if want.margin < NEAR:
            continue
        with torch.inference_mode():
            while len(tokens) < 20:
                loop.admit(0, replace(request, max_tokens=20 - len(tokens)))
                loop.prompt([Prompt(0, torch.tensor(prompt + tokens), 0, True, generated=len(prompt))])
                for _ in range(3):
                    loop.step(row)
                    tokens += loop.state.requests.tokens[0, : int(loop.state.requests.count[0])].tolist()
                request = replace(request, forced_depths=loop.release(0).tolist())
                for cache in (one for pair in caches for one in pair):
                    cache.normal_(std=4.0)
                preempted += 1
        assert tokens == want.tokens, (prompt, asked)
    assert preempted > 24


def test_a_request_that_overflows_leaves_nothing_to_others():
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "injection" in name:
                parameter.mul_(8)
    engine = Engine(model, rows=1, length=100, wave=8, kv_policy="last-exited")
    prompt, plain = list(range(3, 40)), Params(24, num_recurrences=4, ignore_eos=True)
    want = engine.generate([prompt], plain)
    wild = DiffusionSettings(inner=3, continuous=True, freeze="acceleration", threshold=0.3)
    engine.generate([[5, 6, 7]], Params(90, ignore_eos=True, decoder="diffusion", wave=4, diffusion=wild))
    assert bool(engine.loop.state.requests.saw_nonfinite[0])
    assert engine.generate([prompt], plain) == want
    assert not bool(engine.loop.state.requests.saw_nonfinite[0])
