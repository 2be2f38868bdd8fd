"""Every pair of options, exit rules and decoders: the tokens of a naive engine, in bounded memory."""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from typing import Any

import psutil
import pytest

from loopwise.serve import Engine, Params
from loopwise.serve.engine.diffusion_settings import DiffusionSettings
from tests.helpers.engines import NEAR, build
from tests.helpers.oracle import Oracle
from tests.helpers.tiny import VOCAB

VALUES: dict[str, tuple[Any, ...]] = {
    "max_num_seqs": (1, 4),
    "kv_policy": ("per-depth", "last-exited"),
    "passes_per_step": (1, 5, 16),
    "max_lanes": (0, 32),
    "coda_wait": (0, 3),
    "max_num_batched_tokens": (16, 512),
    "max_in_flight": (1, 2, 8),
    "rule": ("fixed", "latent-diff", "cosine", "kl", "minp-kl", "entropy-diff", "argmax-stability"),
    "decoder": ("plain", "wave", "diffusion"),
    "drafts": ("default", "every", "depths"),
    "sampling": ("greedy", "penalised", "sampled"),
    "prompt_exit": (False, True),
    "stop": (False, True),
}
THRESHOLDS = {
    "latent-diff": 0.7,
    "cosine": 0.3,
    "entropy-diff": 0.1,
    "kl": 0.3,
    "minp-kl": 0.3,
    "argmax-stability": 1.0,
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalised": {"repetition_penalty": 1.3},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 7},
}
DRAFTS: dict[str, dict[str, Any]] = {"default": {}, "every": {"draft_every": 2}, "depths": {"draft_depths": (1, 3)}}
Row = dict[str, Any]


def valid(row: Row) -> bool:
    """False for what the engine refuses by name."""
    if row["decoder"] != "plain" and row["max_in_flight"] == 1:
        return False
    if row["decoder"] != "wave" and row["drafts"] != "default":
        return False
    if row["decoder"] == "diffusion":
        return row["rule"] == "fixed" and not row["prompt_exit"] and row["sampling"] == "greedy"
    early = row["rule"] in ("latent-diff", "cosine") and row["kv_policy"] != "per-depth"
    return early or not row["prompt_exit"]


def pairs(row: Row) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(row.items(), 2))


def table() -> list[Row]:
    """Few rows that have every pair which any valid row has: greedily, the best of forty random ones each time."""
    draw = random.Random(0)
    rows = [{name: draw.choice(values) for name, values in VALUES.items()} for _ in range(6000)]
    rows = [row for row in rows if valid(row)]
    missing, chosen = set().union(*map(pairs, rows)), []
    while missing:
        wanted = next(iter(sorted(missing, key=repr)))
        best = max((r for r in rows if {*wanted} <= {*r.items()}), key=lambda row: len(pairs(row) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


TABLE = table()


def run(row: Row) -> int:
    """Three prompts by `row`; the number of answers that could be compared."""
    model = build()
    options = {name: row[name] for name in list(VALUES)[:7]}
    keys: Row = {"max_tokens": 10, "num_recurrences": 4, "ignore_eos": True, "decoder": row["decoder"]}
    keys |= {"max_in_flight": row["max_in_flight"], "prompt_exit": row["prompt_exit"], **SAMPLING[row["sampling"]]}
    keys |= DRAFTS[row["drafts"]]
    if row["rule"] != "fixed":
        keys |= {"exit_rule": row["rule"], "min_recurrences": 1}
        keys |= {"exit_threshold": THRESHOLDS[row["rule"]]} if row["rule"] in THRESHOLDS else {}
    if row["decoder"] == "diffusion":
        keys["diffusion"] = DiffusionSettings(inner=2, freeze="fixed", headway=2)
    draw = random.Random(repr(row))
    prompts = [[draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 40))] for _ in range(3)]
    params, oracle = Params(**keys), Oracle(model, row["kv_policy"])
    if row["decoder"] == "diffusion":
        want: list[Any] = [oracle.diffuse(prompt, params, row["max_in_flight"]) for prompt in prompts]
    elif row["sampling"] == "sampled":  # the draws are the engine's own: each request alone, without a wave
        slow = Engine(build(), max_num_seqs=1, max_model_len=64, kv_policy=row["kv_policy"], passes_per_step=1)
        want = slow.generate(prompts, Params(**{**keys, "decoder": "plain", "draft_every": None, "draft_depths": ()}))
    else:
        want = [oracle.generate(prompt, params) for prompt in prompts]
    engine = Engine(model, max_model_len=64, **options)  # the model is the engine's from here on
    got = engine.generate(prompts, params)
    assert [done.error for done in got] == [None] * 3
    clear = [n for n, answer in enumerate(want) if getattr(answer, "margin", 1) > NEAR]
    for n in clear:
        assert got[n].tokens == want[n].tokens, row
    if row["stop"]:  # ends at a token, and the lanes are free again
        token = got[0].tokens[3]
        (cut,) = engine.generate([prompts[0]], Params(**keys, stop_token_ids=(token,)))
        if row["decoder"] != "diffusion":
            assert cut.tokens == got[0].tokens[: got[0].tokens.index(token) + 1]
    return len(clear)


def test_the_table_has_every_pair():
    everywhere = set().union(*map(pairs, TABLE))
    for (one, some), (other, more) in itertools.combinations(VALUES.items(), 2):
        for a, b in itertools.product(some, more):
            if ((one, a), (other, b)) not in everywhere:  # only what no valid row has
                assert {"rule", "decoder", "max_in_flight", "prompt_exit", "sampling", "kv_policy", "drafts"} >= {
                    one,
                    other,
                }
    assert len(TABLE) < 60


def test_some_rows():
    assert sum(run(row) for row in TABLE[:2]) >= 3


def test_an_engine_that_is_gone_leaves_no_model():
    model = build()
    model_of = weakref.ref(model)
    Engine(model, max_num_seqs=1, max_model_len=20).generate([[5, 6]], Params(2, ignore_eos=True))
    del model
    for _ in range(2):  # the engine, then its model
        gc.collect()
    assert model_of() is None


@pytest.mark.slow
def test_every_pair_gives_the_tokens_of_a_naive_engine_in_bounded_memory():
    """After one round, another takes no more memory."""
    process = psutil.Process()
    first = _round()
    before = process.memory_info().rss
    assert _round() == first > 2 * len(TABLE)
    assert process.memory_info().rss < before * 1.05 + (8 << 20)


def _round() -> int:
    found = 0
    for row in TABLE:
        found += run(row)
        gc.collect()  # models and engines refer to each other
    return found
