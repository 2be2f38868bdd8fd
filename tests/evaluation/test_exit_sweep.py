"""Exit rules on held-out data: decoding with forced tokens against the naive engine, sweeps, calibration."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loopwise.cli import main
from loopwise.directory import changed_weights, check_nothing_foreign
from loopwise.disk import checksum
from loopwise.evaluation import calibrate
from loopwise.evaluation.answers import Answer, Sequences
from loopwise.evaluation.exits.bench import Bench, Decoding
from loopwise.evaluation.exits.choose import choose
from loopwise.evaluation.exits.forced import ForcedEngine, Span
from loopwise.evaluation.exits.readings import Recorder, Saved
from loopwise.evaluation.plot.evaluation import eval_figure
from loopwise.evaluation.plot.sweep import sweep_figure
from loopwise.exit_rules import ExitRule
from loopwise.serve import Engine, Params
from tests.helpers.engines import NEAR, build
from tests.helpers.oracle import Answer as Naive
from tests.helpers.oracle import Oracle, Store
from tests.helpers.tiny import VOCAB
from tests.helpers.train_tiny import run, save_recurrent

DEPTH = 4


def spans(count: int = 5) -> list[Span]:
    rng = np.random.default_rng(0)
    return [Span(rng.integers(3, VOCAB, 4 + 3 * i), 1 + i * 2, i) for i in range(count)]


@torch.no_grad()
def naive(oracle: Oracle, span: Span, params: Params) -> tuple[float, list[int], float]:
    """(loss, depths of the answer's tokens, margin), one position at a time on the oracle."""
    store, answer = Store(oracle.policy, DEPTH, oracle.length), Naive()
    ids = span.ids.tolist()
    forced = [0 if params.prompt_exit else DEPTH] * span.start
    x = oracle.positions(ids[: span.start], 0, store, answer, params, forced)
    loss = 0.0
    for place in range(span.start, len(ids)):
        loss += float(F.cross_entropy(oracle.logits(x[None]), torch.tensor(ids[place : place + 1])))
        if place + 1 < len(ids):
            x = oracle.positions(ids[place : place + 1], place, store, answer, params, [0])
    return loss, answer.depths, answer.margin


@pytest.mark.parametrize(
    ("policy", "rule", "coda", "prompt_exit"),
    [
        ("per-depth", "latent-diff", [3], False),
        ("per-depth", "kl", [3], False),
        ("last-exited", "cosine", [3], True),
        ("last-exited", "entropy-diff", [], True),
        ("last-exited", "gate", [], False),
        ("first", "latent-diff", [3], True),
        ("single", "cosine", [3], True),
        ("modulo-2", "kl", [3], False),
        ("last-exited", "fixed", [3], False),
    ],
)
def test_forced_decoding_equals_the_naive_engine(policy, rule, coda, prompt_exit):
    """Losses and depths, whether positions run together or one by one."""
    fields: dict[str, Any] = {"coda": coda, "exit_gate": rule == "gate"}
    options: dict[str, Any] = {"kv_policy": policy, "max_model_len": 20, "max_recurrences": DEPTH}
    engine = ForcedEngine(build(**fields), max_num_seqs=2, max_num_batched_tokens=12, **options)
    given, params = spans(), Params(1, DEPTH, 1, exit_rule=rule, prompt_exit=prompt_exit)
    if rule != "fixed":  # exits at half the recurrences
        recorder = Recorder(given, DEPTH)
        engine.decode(given, params, watch=recorder)
        params = replace(params, exit_threshold=Saved.of(rule, recorder.values, 1).threshold(0.5))
    want = [naive(Oracle(build(**fields), policy), span, params) for span in given]
    ways = [False, True] if engine.at_once(rule) else [False]
    assert (len(ways) == 1) == (policy in ("single", "modulo-2") or (rule == "kl" and bool(coda)))
    for at_once in ways:
        found = engine.decode(given, params, at_once=at_once)
        clear = 0
        for number, (loss, depths, margin) in enumerate(want):
            if margin > NEAR:
                clear += 1
                assert found.depths[number][given[number].start - 1 :] == depths
                assert found.losses[number] == pytest.approx(loss, abs=2e-4)
        assert clear >= 4
    seen = {depth for _, depths, _ in want for depth in depths}
    assert len(seen) > 1 or rule == "fixed"  # the rule does fire, and not always at once
    assert not engine.loop.work.in_use
    assert engine.loop.rules.watch is None


def test_an_answer_is_right_where_the_engine_would_generate_it():
    model = build()
    params = Params(4, DEPTH, exit_rule="latent-diff", exit_threshold=0.7, ignore_eos=True)
    prompts = [span.ids.tolist() for span in spans(3)]
    engine = Engine(model, max_num_seqs=2, max_model_len=40, kv_policy="last-exited")
    done = engine.generate(prompts, params)
    given = [Span(np.array(p + d.tokens), len(p), i) for i, (p, d) in enumerate(zip(prompts, done, strict=True))]
    given[1].ids[-1] = (given[1].ids[-1] + 1) % VOCAB
    found = ForcedEngine(model, max_num_seqs=2, max_model_len=40, kv_policy="last-exited").decode(given, params)
    assert found.right.tolist() == [True, False, True]
    assert [depths[span.start - 1 :] for span, depths in zip(given, found.depths, strict=True)] == [
        d.depths for d in done
    ]


@pytest.mark.parametrize("rule", ["cosine", "argmax-stability"])
def test_thresholds_save_the_share_of_recurrences_that_they_are_chosen_for(rule):
    """Readings [P, R] as numbers; depths are counted position by position."""
    rng = np.random.default_rng(1)
    values = rng.integers(0, 6, (400, 9)).astype(float) if rule == "argmax-stability" else rng.random((400, 9))
    values[:100] = np.nan  # positions that may not leave
    saved = Saved.of(rule, values, 2)

    def mean_depth(threshold: float) -> float:
        depths = []
        for row in values[100:]:
            fires = row >= threshold if rule == "argmax-stability" else row < threshold
            depths.append(next((r for r in range(2, 9) if fires[r - 1]), 9))
        return float(np.mean(depths))

    for share in (0.2, 0.5, 0.8):
        threshold = saved.threshold(share)
        assert threshold is not None
        if rule == "cosine":
            assert mean_depth(threshold) == pytest.approx(9 - share * 7, abs=0.1)
        else:  # whole numbers: no other one is nearer
            distances = {whole: abs(mean_depth(whole) - (9 - share * 7)) for whole in range(1, 6)}
            assert distances[int(threshold)] == min(distances.values())
    depths = [mean_depth(threshold) for threshold in saved.thresholds(5)]
    if rule == "cosine":
        assert np.allclose(np.diff(depths), -7 / 6, atol=0.15)
    else:
        assert saved.thresholds(20) == [1, 2, 3, 4, 5]


# ---- the commands ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer) -> Path:
    """A model whose state changes at every depth."""
    path = save_recurrent(tmp_path_factory.mktemp("exits") / "model", tokenizer, num_recurrences=4, max_recurrences=8)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(0)
    for parameter in loaded.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    loaded.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory, text) -> Path:
    """Conversations of two turns."""
    path = tmp_path_factory.mktemp("exits") / "chats.jsonl"
    roles = ("user", "assistant", "user", "assistant")
    records = [
        {"messages": [{"role": r, "content": text[4 * i + j][: 4 + j]} for j, r in enumerate(roles)], "kind": i % 2}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def said(arguments: list[str], capsys) -> dict[str, Any]:
    capsys.readouterr()
    run([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def refused(arguments: list[str], capsys) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_a_sweep_beside_fixed_depths(model, chats, tmp_path, capsys):
    """Fixed depths are those of the transformers model; the picture and the table are drawn from the result."""
    arguments = ["eval", str(model), f"data={chats}", "chat_field=messages", "group=kind", "batch_size=5"]
    want = said([*arguments, "num_recurrences=1,2,3,4"], capsys)
    out = tmp_path / "sweep.json"
    sweep = [*arguments, "exit_sweep=latent-diff,cosine", "thresholds=3", "kv_policy=last-exited"]
    found = said([*sweep, "prompt_exit=true", "--out", str(out)], capsys)
    assert (found["answers"], found["tokens"]) == (want["answers"], want["tokens"])
    for row, other in zip(found["results"], want["results"], strict=True):
        assert row["num_recurrences"] == other["num_recurrences"] == row["mean_recurrences"]
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert row["loss_error"] == pytest.approx(other["loss_error"], abs=1e-4)
        assert row["accuracy"] == other["accuracy"]
        assert row["over_full"] == pytest.approx(row["loss"] - found["results"][-1]["loss"], abs=1e-6)
        assert [*row["groups"]] == ["0", "1"]
    depths = [row["mean_recurrences"] for row in found["exits"]["latent-diff"]]
    assert len(depths) == 3
    assert 1 < depths[0] < depths[1] < depths[2] < 4
    run(["plot", "sweep", str(out)])
    assert (tmp_path / "sweep.sweep.png").read_bytes().startswith(b"\x89PNG")
    run([*sweep, "prompt_exit=true"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "decoded up to R=4 under kv_policy=last-exited, prompt_exit"
    assert sum(line.startswith("latent-diff ") for line in lines) == 3
    assert lines[-2].startswith("fewest recurrences within 0.01 nats a token of R=4: fixed ")
    assert lines[-1].startswith("fewest recurrences with right answers within one standard error of R=4: fixed ")
    axes: Any = sweep_figure(out).axes[0]
    fixed, latent = axes.containers[:2]
    assert (fixed.lines[0].get_linestyle(), latent.lines[0].get_linestyle()) == ("None", "-")
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "bars: one standard error" in legend


TRAINED = "† beyond the 1 to 2 recurrences (mean 1.5) that the model was trained at"


def test_depths_beyond_the_training_are_marked(model, chats, tmp_path, capsys):
    """In a sweep, a calibration and a loss, in their tables and pictures; one warning line names them."""
    copy = shutil.copytree(model, tmp_path / "trained")
    fields = json.loads((copy / "config.json").read_text())
    fields["trained_recurrences"] = {"min": 1, "max": 2, "mean": 1.5}
    (copy / "config.json").write_text(json.dumps(fields))
    given, out = [f"data={chats}", "chat_field=messages"], tmp_path / "sweep.json"
    exits = ["kv_policy=last-exited", "prompt_exit=true"]
    warning = "warning: num_recurrences=3, 4: this model was trained at 1 to 2 recurrences (mean 1.5), and not beyond"
    run(["eval", str(copy), *given, *exits, "exit_sweep=cosine", "thresholds=3", "--out", str(out)])
    shown, told = capsys.readouterr()
    assert told.count(warning) == 1
    assert TRAINED in shown.splitlines()
    found = json.loads(out.read_text())
    rows = found["results"] + found["exits"]["cosine"]
    assert [row["beyond_trained"] for row in rows] == [row["mean_recurrences"] > 2 for row in rows]
    assert {row["beyond_trained"] for row in found["exits"]["cosine"]} == {False, True}
    assert shown.count("†") == 1 + sum(row["beyond_trained"] for row in rows)
    axes: Any = sweep_figure(out).axes[0]
    (span,) = axes.patches
    left, right = span.get_extents().transformed(axes.transData.inverted()).intervalx
    assert (left, right) == pytest.approx((2, axes.get_xlim()[1]))
    assert right > 4
    run(["calibrate", str(copy), str(tmp_path / "out"), *given, *exits, "rule=cosine", "budget=9"])
    shown, told = capsys.readouterr()
    assert told.count(warning) == 1
    assert TRAINED in shown.splitlines()
    assert json.loads((tmp_path / "out" / "calibration.json").read_text())["results"][-1]["beyond_trained"]
    run(["eval", str(copy), *given, "group=kind", "num_recurrences=2,4", "--out", str(tmp_path / "loss.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[:11].strip().isdigit()] == ["2", "4†"]
    assert TRAINED in lines
    figure: Any = eval_figure(tmp_path / "loss.json")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["2", "4 †"]
    assert figure.get_suptitle().endswith("\n† deeper than trained (up to R = 2)")


def test_a_loss_may_hold_where_right_answers_do_not():
    from loopwise.evaluation.exits.table import calibration_table, least_depths, least_depths_of_answers

    def row(depth: float, over: float, right: float) -> dict[str, Any]:
        loss = {"loss": 1 + over, "loss_error": 0.1, "over_full": over, "over_full_error": 0.001}
        return {"mean_recurrences": depth, **loss, "accuracy": right, "accuracy_error": 0.02}

    full = {"num_recurrences": 8, **row(8, 0.0, 0.80)}
    low, high = ({"threshold": depth / 10, **row(depth, 0.0, right)} for depth, right in ((2.0, 0.65), (5.0, 0.79)))
    decoding = {"num_recurrences": 8, "min_recurrences": 1, "kv_policy": "last-exited", "prompt_exit": True}
    result = {**decoding, "results": [full], "exits": {"cosine": [low, high]}}
    assert least_depths(result, 0.01)["cosine"] == low
    assert least_depths_of_answers(result) == {"fixed": full, "cosine": high}
    found = {**result, "rule": "cosine", "budget": 0.01, "tokens": 9, "check_tokens": 9, "chosen": low}
    for chosen, warned in ((low, True), (high, False)):
        text = calibration_table({**found, "check": {"full": full, "chosen": chosen}})
        assert ("are right, and 80.0 % at full depth" in text) == warned
        assert "right in %" in text
        assert "look for a smaller num_recurrences" not in text
    assert "without a rule" not in text
    half = {"num_recurrences": 4, **row(4, 0.0, 0.80)}
    found["results"] = [half, full]
    for chosen, noted in ((high, True), (low, False)):  # a fixed depth that spends less, and one that spends more
        text = calibration_table({**found, "chosen": chosen, "check": {"full": full, "chosen": chosen}})
        line = "note: num_recurrences=4 stays within the budget without a rule, at no more recurrences than the chosen "
        assert (line + "5.00" in text.splitlines()) == noted
        assert ("without a rule" in text) == noted
    better = {"threshold": 0.2, **row(2.0, -0.1, 0.80)}
    text = calibration_table({**found, "chosen": better, "check": {"full": full, "chosen": better}})
    assert "note: R=8 has a greater loss on both halves: look for a smaller num_recurrences first" in text


def test_a_text_is_decoded_from_its_first_token_on(model, tmp_path, text, capsys):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in text[:3]))
    arguments = ["eval", str(model), f"data={file}", "sequence_length=16", "limit=4"]
    found = said([*arguments, "exit_sweep=all", "thresholds=1", "num_recurrences=2,4"], capsys)
    want = said([*arguments, "num_recurrences=2,4"], capsys)
    for row, other in zip(found["results"], want["results"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert [*found["exits"]] == [rule for rule in get_args(ExitRule) if rule not in ("fixed", "gate")]
    assert "accuracy" not in found["results"][0]
    for rows in found["exits"].values():
        assert 1 < rows[0]["mean_recurrences"] <= 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["exit_sweep=gate"], "exit_rule='gate': this model has no exit gate"),
        (["exit_sweep=fixed,cosine"], "every sweep has fixed depths"),
        (["exit_sweep=cosine,cosine"], "cosine stands twice"),
        (["exit_sweep=depth"], "exit_sweep='depth': Input should be 'all'"),
        (["exit_sweep=kl", "kv_policy=last-exited", "prompt_exit=true"], "reads logits through a coda"),
        (["exit_sweep=cosine", "kv_policy=all"], "kv_policy='all': choose from per-depth"),
        (["exit_sweep=cosine", "prompt_exit=true"], "prompt_exit saves nothing with kv_policy='per-depth'"),
        (["exit_sweep=cosine", "num_recurrences=1"], "num_recurrences=1, min_recurrences=1: a rule has no recurrence"),
        (["kv_policy=first"], "kv_policy=first has no effect"),
        (["exit_sweep=cosine", "endpoint=http://127.0.0.1:9/v1"], "leave endpoint or exit_sweep out"),
    ],
)
def test_sweeps_that_measure_nothing_are_refused(model, chats, more, message, capsys):
    assert message in refused(["eval", str(model), f"data={chats}", "chat_field=messages", *more], capsys)


def test_answers_of_one_token_come_of_the_prompt(model):
    given = Sequences([np.arange(3, 9)] * 2, [np.arange(6) == 5] * 2, [Answer(0, 5, 5, None), Answer(1, 5, 5, None)])
    from loopwise.errors import UserError
    from loopwise.train.pretrained import load_model

    bench = Bench.open(load_model(str(model)), given, Decoding(4, 1, "last-exited"), 2)
    with pytest.raises(UserError, match=r"answers of one token .* set prompt_exit=true"):
        bench.saved("cosine")


class Scripted:
    """A Bench whose loss above full depth is a function of the mean depth, 1 to 8; thresholds are mean depths."""

    def __init__(self, over: Any):
        self.over, self.decoding = over, Decoding(8, 1, "last-exited")

    def fixed(self, depth: int) -> dict[str, Any]:
        return {"num_recurrences": 8, "mean_recurrences": 8.0, "over_full": 0.0, "loss": 1.0}

    def saved(self, rule: str) -> Any:
        return self

    def threshold(self, share: float) -> float:
        return 8 - 7 * share

    def at(self, rule: str, threshold: float) -> dict[str, Any]:
        return {"threshold": threshold, "mean_recurrences": threshold, "over_full": self.over(threshold), "loss": 1.0}


@pytest.mark.parametrize("least", [1.0, 2.3, 5.1, 7.8])
def test_the_smallest_mean_depth_within_the_budget_is_found(least):
    bench: Any = Scripted(lambda depth: 0.0 if depth >= least else 0.5)
    full, chosen, curve = choose(bench, "cosine", 0.01)
    assert full["mean_recurrences"] == 8
    assert least <= chosen["mean_recurrences"] <= least + 7 / 64
    assert chosen in curve
    assert [row["mean_recurrences"] for row in curve] == sorted(row["mean_recurrences"] for row in curve)


def test_a_calibrated_copy(model, chats, tmp_path, capsys):
    """The source stays, weights are links, the config has the exit of the curve beside it, and the engine uses it."""
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    out = tmp_path / "out"
    arguments = ["calibrate", str(model), str(out), f"data={chats}", "chat_field=messages", "rule=latent-diff"]
    run([*arguments, "kv_policy=last-exited", "budget=3"])
    printed = capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert (out / "model.safetensors").samefile(model / "model.safetensors")
    config, found = (json.loads((out / name).read_text()) for name in ("config.json", "calibration.json"))
    chosen = found["chosen"]
    assert config["exit"] == {"rule": "latent-diff", "threshold": chosen["threshold"], "min_recurrences": 1}
    assert config["kv_policy"] == "last-exited"
    original = json.loads((model / "config.json").read_text())
    assert {**original, "exit": config["exit"], "kv_policy": "last-exited"} == config
    rows = found["exits"]["latent-diff"]
    assert chosen == min((r for r in rows if r["over_full"] <= 3), key=lambda row: row["mean_recurrences"])
    assert found["check"]["chosen"]["threshold"] == chosen["threshold"]
    assert f"exit.threshold={chosen['threshold']:.3g}" in printed
    fixed = found["results"]  # beside the curve, as many depths as a sweep has
    assert [row["num_recurrences"] for row in fixed] == [row["mean_recurrences"] for row in fixed] == [1, 2, 3, 4]
    assert all(row["over_full"] == pytest.approx(row["loss"] - fixed[-1]["loss"], abs=1e-6) for row in fixed)
    assert len({round(row["loss"], 4) for row in fixed}) == 4
    lines = printed.splitlines()
    assert [line.split()[:2] for line in lines[lines.index("fixed depths:") + 1 :][:4]] == [
        ["-", f"{depth}.00"] for depth in (1, 2, 3, 4)
    ]
    request = Engine(str(out), max_num_seqs=1, max_model_len=20).request(Params())
    assert (request.rule, request.threshold) == ("latent-diff", chosen["threshold"])
    run(["plot", "sweep", str(out / "calibration.json")])
    drawn: Any = sweep_figure(out / "calibration.json").axes[0]
    legend = [text.get_text() for text in drawn.get_legend().get_texts()]
    assert "bars: standard error of the distance from full depth" in legend
    assert f"{100 * chosen['accuracy']:.0f} % of the answers right" in "".join(legend)
    assert "fixed depths" in legend
    earlier = tmp_path / "earlier.json"  # which has full depth alone
    earlier.write_text(json.dumps({**found, "results": fixed[-1:]}))
    drawn = sweep_figure(earlier).axes[0]
    assert "R=4" in [text.get_text() for text in drawn.get_legend().get_texts()]
    assert "is not empty" in refused([*arguments, "budget=3"], capsys)
    run([*arguments, "budget=3", "--force"])


WRONG = {
    "weights": [5, None, "model.safetensors", {"model.safetensors": None}, {"model.safetensors": [1, 2]}],
    "files": [5, "config.json", [None, "optimizer.pt"]],
    "code": [5, {"a.py": "0"}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_copy_has_sums_of_its_own(key, value, model, tmp_path):
    """Whatever a stranger's record has in their place; its provenance goes on."""
    source = shutil.copytree(model, tmp_path / "source")
    given = {"loopwise": "0.1.0", "source": {"id": "them/base"}, "unfinished": True, "marker": {}, key: value}
    (source / "loopwise.json").write_text(json.dumps(given))
    out, weights = tmp_path / "out", [source / "model.safetensors"]
    calibrate._write("them/model", source, out, weights, {"kv_policy": "last-exited"}, None, force=False)
    assert (out / "model.safetensors").samefile(weights[0])
    record = json.loads((out / "loopwise.json").read_text())
    assert record["weights"] == {"model.safetensors": [weights[0].stat().st_size, checksum(weights[0])]}
    assert {*record["files"]} == {path.name for path in out.iterdir()}
    assert {*record["code"]} == {path.name for path in out.glob("*.py")}
    assert record.keys() == {"loopwise", "source", "calibrated", "code", "files", "weights"}
    assert record["source"] == {"id": "them/base"}
    assert changed_weights(out, thorough=True) is None
    check_nothing_foreign(out)


def test_halves_share_no_sequence_and_check_the_choice(model, chats, tmp_path, capsys, monkeypatch):
    from loopwise.evaluation.exits import calibration

    seen = []
    monkeypatch.setattr(calibration, "choose", lambda bench, *_: seen.append(bench) or choose(bench, *_))
    out = tmp_path / "out"
    run(["calibrate", str(model), str(out), f"data={chats}", "chat_field=messages", "rule=cosine", "budget=5"])
    (bench,) = seen
    found = json.loads((out / "calibration.json").read_text())
    assert found["tokens"] == int(bench.tokens.sum())
    everything = said(["eval", str(model), f"data={chats}", "chat_field=messages"], capsys)
    assert found["tokens"] + found["check_tokens"] == everything["tokens"]
    mean = (
        found["results"][-1]["loss"] * found["tokens"] + found["check"]["full"]["loss"] * found["check_tokens"]
    ) / everything["tokens"]
    assert mean == pytest.approx(everything["results"][0]["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["rule=latent-diff", "budget=0.5"], "no threshold stays within budget=0.5 nats a token"),
        ([], "rule: name the exit rule to calibrate"),
        (["rule=gate"], "this model has no exit gate"),
        (["rule=cosine", "budget=-1"], "budget=-1"),
        (["rule=cosine", "limit=1"], "one sequence, and a half of the data checks the other"),
    ],
)
def test_what_cannot_be_calibrated_is_not_written(model, chats, more, message, tmp_path, capsys, monkeypatch):
    at = Bench.at
    monkeypatch.setattr(Bench, "at", lambda *args: {**at(*args), "over_full": 1.0})
    arguments = ["calibrate", str(model), str(tmp_path / "out"), f"data={chats}", "chat_field=messages", *more]
    assert message in refused(arguments, capsys)
    assert not list(tmp_path.iterdir())


def test_a_calibration_without_data_says_what_is_missing(model, tmp_path, capsys):
    message = refused(["calibrate", str(model), str(tmp_path / "out")], capsys)
    assert "data: name the data to calibrate on: loopwise calibrate MODEL OUT data=" in message


def test_a_router_is_calibrated_in_a_copy(tokenizer, tmp_path, text, capsys):
    router = {"kind": "expert", "depths": 2, "inference": "topk", "capacity": [0.9, 0.4]}
    model = save_recurrent(tmp_path / "model", tokenizer, router=router, injection="none", num_recurrences=2)
    file, before = tmp_path / "text.txt", (model / "config.json").read_text()
    file.write_text("\n".join(text))
    run(["calibrate", str(model), str(tmp_path / "out"), f"data={file}"])
    assert "0.9" in capsys.readouterr().out
    assert (model / "config.json").read_text() == before
    copied = json.loads((tmp_path / "out" / "config.json").read_text())["router"]
    assert copied["inference"] == "threshold"
    assert "rule=cosine has no effect" in refused(
        ["calibrate", str(model), str(tmp_path / "new"), f"data={file}", "rule=cosine"], capsys
    )
    run(["calibrate", str(model), str(file)])
    assert "is deprecated" in capsys.readouterr().err
    assert json.loads((model / "config.json").read_text())["router"] == copied
