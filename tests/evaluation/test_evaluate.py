"""`loopwise eval`: losses and right answers by depth and group, and the warning for a loop without effect."""

from __future__ import annotations

import errno
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loopwise.cli import main
from loopwise.evaluation import depths
from loopwise.evaluation.answers import Answer, Sequences, conversations
from loopwise.evaluation.plot.evaluation import eval_figure
from loopwise.evaluation.recipe import Evaluate
from loopwise.evaluation.result_file import write_result
from loopwise.evaluation.search.recipe import Search
from loopwise.train import tasks
from loopwise.train.pretrained import load_model
from tests.helpers.train_tiny import run, save_recurrent

PLAIN_MODES = {"injection": "none", "num_recurrences": 2}
MODELS = {
    "recurrent": {},
    "norm and random state": {"recurrence_norm": "each", "state_init": "normal"},
    "exit gate": {"exit_gate": True, "recurrence_norm": "between"},
    "expert choice": {"router": {"kind": "expert", "depths": 3, "auxiliary": True}, **PLAIN_MODES},
    "token choice": {"router": {"kind": "token", "depths": 2}, **PLAIN_MODES},
    "sequence": {"sharing": "sequence", **PLAIN_MODES},
    "damped": {"recurrence_damping": 0.5},
    "damped by R": {"recurrence_damping": "1/R"},
}


def said(arguments: list[str], capsys) -> dict:
    capsys.readouterr()
    run([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def sequences(lengths: list[int], learned: int) -> Sequences:
    """Sequences of random ids; the last `learned` ids of each are an answer."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 272, length) for length in lengths]
    marks = [np.arange(length) >= length - learned for length in lengths]
    return Sequences(ids, marks, [Answer(i, n - learned, n - 1, None) for i, n in enumerate(lengths)])


@pytest.mark.parametrize("name", MODELS)
def test_one_pass_measures_what_runs_at_each_depth_do(name, tokenizer, tmp_path):
    """Bit-identical to separate runs; up to rounding equal to a run without padding and neighbors."""
    model = load_model(str(save_recurrent(tmp_path / "model", tokenizer, **MODELS[name])))
    asked = [2] if name == "token choice" else [1, 2, 3]
    found = sequences([9, 17, 12, 9, 30], learned=4)
    together = depths.measure(model, found, asked, tokens_per_batch=64)
    assert (together.states is None) == ("choice" in name or name == "sequence")
    assert depths.in_one_pass(model.config) == (together.states is not None and name != "damped by R")
    for depth in asked:
        alone = depths.measure(model, found, [depth], tokens_per_batch=64)
        assert np.array_equal(together.losses[depth], alone.losses[depth])
        assert np.array_equal(together.right[depth], alone.right[depth])
        for i, ids in enumerate(found.ids):
            with torch.no_grad():
                keys = {"num_recurrences": depth, "sequence_ids": torch.tensor([i]), "use_cache": False}
                logits = model(input_ids=torch.tensor(ids)[None], **keys).logits[0]
            loss = F.cross_entropy(logits[-5:-1], torch.tensor(ids[-4:]), reduction="sum")
            assert together.losses[depth][i] == pytest.approx(loss.item(), rel=1e-5)
    assert together.tokens.tolist() == [4] * 5


def test_an_answer_is_right_where_all_its_tokens_are_the_likeliest(recurrent):
    model = load_model(str(recurrent)).eval()
    found = sequences([9, 17, 12, 9, 30], learned=3)
    for i, ids in enumerate(found.ids):
        for place in range(len(ids) - 3, len(ids)):
            logits = model(input_ids=torch.tensor(ids[:place])[None], num_recurrences=2, use_cache=False).logits
            ids[place] = int(logits[0, -1].argmax())
            if (i, place - len(ids)) in ((1, -3), (4, -1)):  # wrong in the first token alone, or in the last
                ids[place] = (ids[place] + 1) % 272
    measured = depths.measure(model, found, [2], tokens_per_batch=64)
    assert measured.right[2].tolist() == [True, False, True, True, False]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An untrained recurrent-depth model with the task's tokenizer."""
    from loopwise.train.init import Init, init

    folder = tmp_path_factory.mktemp("small")
    init("task:hops", folder / "empty", Init(hidden_size=32, num_attention_heads=2))
    run(["convert", str(folder / "empty"), str(folder / "model"), "sizes=1,1,0", "injection=linear"])
    return folder / "model"


@pytest.fixture(scope="module")
def short(tmp_path_factory, text):
    """A file of a few documents."""
    path = tmp_path_factory.mktemp("texts") / "short.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in text[:10]))
    return path


TASK = "task:hops?hops=0+1+6+10&questions=1&lookups=0&records=40"


def test_right_answers_by_depth_and_group(small, capsys, tmp_path):
    arguments = ["eval", str(small), f"data={TASK}", "group=hops", "num_recurrences=1,3"]
    result = said([*arguments, "--out", str(tmp_path / "result.json")], capsys)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (result["records"], result["answers"], result["tokens"], result["group"]) == (40, 40, 40, "hops")
    model, tokenizer = load_model(str(small)).eval(), tasks.tokenizer("hops")
    parsed: Any = tasks.parse(f"{TASK}&split=held-out")
    records = list(parsed.records())
    asked = [tokenizer(record["messages"][0]["content"])["input_ids"] for record in records]
    answers = torch.tensor([tokenizer(record["messages"][1]["content"])["input_ids"][0] for record in records])
    for row, depth in zip(result["results"], (1, 3), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(asked), num_recurrences=depth, use_cache=False).logits[:, -1]
        losses, right = F.cross_entropy(logits, answers, reduction="none"), logits.argmax(-1) == answers
        assert row["num_recurrences"] == depth
        assert row["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
        assert row["loss_error"] == pytest.approx(losses.std().item() / math.sqrt(40), abs=1e-5)
        assert row["accuracy"] == right.float().mean().item()
        parts: Any = (model.prelude, model.coda, model.get_output_embeddings())
        once = sum(p.numel() for part in parts for p in part.parameters())
        recurring: Any = (model.core, model.injection)
        each = sum(p.numel() for part in recurring for p in part.parameters())
        assert row["flops_per_token"] == pytest.approx(2 * (once + depth * each), rel=0.01)  # norms multiply, too
        assert list(row["groups"]) == ["0", "1", "6", "10"]
        for number, group in enumerate(row["groups"].values()):
            p = right[number::4].float().mean().item()
            assert group["answers"] == 10
            assert group["accuracy"] == pytest.approx(p)
            assert group["accuracy_error"] == pytest.approx(math.sqrt(p * (1 - p) / 9))
    run(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "right answers in %, by hops"
    assert lines[2].split() == ["recurrences", "loss", "perplexity", "0", "1", "6", "10", "all"]
    for line, row in zip(lines[3:], (result["guess"], *result["results"]), strict=False):
        shares = [*(group["accuracy"] for group in row["groups"].values()), row["accuracy"]]
        assert line.split()[-5:] == [f"{100 * share:.1f}" for share in shares]
    assert lines[3].split()[0] == "guess"
    chances = [parsed.guess(record)[0] for record in records]
    for number, group in enumerate(("0", "1", "6", "10")):
        assert result["guess"]["groups"][group]["accuracy"] == pytest.approx(sum(chances[number::4]) / 10)
    assert result["guess"]["accuracy"] == pytest.approx(sum(chances) / 40)
    figure: Any = eval_figure(tmp_path / "result.json")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["guess", "1", "3"]
    drawn = [text.get_text() for text in figure.axes[0].texts[:4]]
    assert drawn == [f"{100 * group['accuracy']:.0f}" for group in result["guess"]["groups"].values()]
    assert "10 answers a cell" in figure.get_suptitle()


def test_guessing_is_known_for_the_measured_answers_alone(small, capsys):
    """With a limit it is that of its records; a share that a run holds out has none."""
    source = "task:hops?hops=1..4&questions=1&lookups=0&records=40"
    arguments = ["eval", str(small), "group=hops", "limit=8"]
    parsed: Any = tasks.parse(f"{source}&split=held-out")
    chances = [parsed.guess(parsed.record(number))[0] for number in range(8)]
    assert said([*arguments, f"data={source}"], capsys)["guess"]["accuracy"] == pytest.approx(sum(chances) / 8)
    assert said([*arguments[:2], f"data={source}", "eval_fraction=0.2"], capsys)["guess"] is None


@pytest.mark.parametrize("limit", [7, 250])
@pytest.mark.parametrize(
    "sources",
    [
        ["task:hops?questions=1&lookups=0"],
        ["task:hops?hops=1+2+4+8&lookups=0&questions=1", "task:hops?hops=1+2+4+8&lookups=0&questions=1&seed=1"],
        ["task:parity"],
        ["task:parity?split=train&length=3..6", "task:s5?length=3..6&records=900"],
    ],
)
def test_a_limit_takes_as_many_records_of_each_group(sources, limit):
    """The limit divides the records of each value, for which an even spread would give one value alone."""
    group = "hops" if "hops" in sources[0] else "length"
    searched = Search(data=sources, limit=limit, kind="chains").asked(sources)
    for recipe in (Evaluate(data=sources, limit=limit), searched):
        recipe = recipe.model_copy(update={"group": group})
        found = Counter(answer.group for answer in conversations(recipe, tasks.tokenizer("sums")).answers)
        wanted = {str(x) for source in sources for x in tasks.parse(source).values[group]}
        assert {*found} == wanted if limit >= len(wanted) else {*found} < wanted
        assert sum(found.values()) == limit
        assert max(found.values()) - min(found.values()) <= 1


def test_conversations_of_a_file(recurrent, tmp_path, capsys):
    """Each answer counts; a group is one value for all answers of a record, or a list with one for each."""
    chat = [
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "because"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "so"},
    ]
    long = [{"role": "user", "content": "x" * 99}, {"role": "assistant", "content": "y"}]
    records = [
        {"chat": chat, "level": "easy", "each": [1, 2]},
        {"chat": chat[:2], "level": "hard", "each": 2},
        {"chat": long, "level": "hard", "each": 2},
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["eval", str(recurrent), f"data={file}", "chat_field=chat", "sequence_length=64"]
    capsys.readouterr()
    assert main([*arguments, "group=level", "--json"]) == 0
    out, error = capsys.readouterr()
    assert "left out: 1 records of over sequence_length=64 tokens" in error
    result = json.loads(out)
    assert (result["records"], result["answers"], result["tokens"]) == (2, 3, 2 * len("because") + len("so"))
    by_level = result["results"][0]["groups"]
    assert {name: group["answers"] for name, group in by_level.items()} == {"easy": 2, "hard": 1}
    by_answer = said([*arguments, "group=each"], capsys)["results"][0]["groups"]
    assert {name: group["answers"] for name, group in by_answer.items()} == {"1": 1, "2": 2}
    import datasets

    datasets.Dataset.from_list([{**r, "each": "one"} for r in records]).to_parquet(tmp_path / "chats.parquet")
    arguments[2] = f"data={tmp_path / 'chats.parquet'}"
    assert said([*arguments, "group=level"], capsys)["results"][0]["groups"] == by_level
    assert said(arguments, capsys)["results"][0]["groups"] == {}


def test_bad_records_are_skipped_and_named(recurrent, tmp_path, capsys):
    """Bad texts, conversations and groups are skipped as in training; without `skip` the first one is named."""
    chat = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
    bad = [
        '{"chat": ',
        '{"chat": 5, "each": 1}',
        json.dumps({"chat": chat}),
        json.dumps({"chat": chat, "each": [1, 2]}),
    ]
    good = json.dumps({"chat": chat, "each": 1, "text": "because it is so"})
    chats, texts, latin = tmp_path / "chats.jsonl", tmp_path / "texts.jsonl", tmp_path / "latin.txt"
    chats.write_text("\n".join([good, *bad, good]))
    texts.write_text("\n".join([good, '{"text": 5}', good]))
    latin.write_bytes("schön".encode("latin-1"))
    for data, settings, named in (
        (
            f"data={chats}",
            ["chat_field=chat", "group=each"],
            ["jsonl:2: ", "jsonl:3: ", "jsonl:4: ", "2 groups"],
        ),
        (f"data={texts},{latin}", ["sequence_length=8"], ["texts.jsonl:2", "latin.txt: not UTF-8"]),
    ):
        arguments = ["eval", str(recurrent), data, *settings, "num_recurrences=2"]
        capsys.readouterr()
        assert main([*arguments, "bad_records=skip", "--json"]) == 0
        out, error = capsys.readouterr()
        lines = [line for line in error.splitlines() if line.startswith("skipped")]
        assert len(lines) == len(named)
        assert all(name in line for name, line in zip(named, lines, strict=True))
        assert f"{len(named)} bad records were skipped" in error
        result = json.loads(out)
        assert result["tokens"] == 2 * len("because") if "chats" in data else 32
        assert main(arguments) == 2
        assert named[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data=task:hops?records=20", "group=hop"], "no field 'hop' to group by among 'messages', 'hops', 'kind'"),
        (["data=CORPUS", "group=hops"], "group=hops groups right answers, and text has none: give chat_field"),
        (["data=['task:hops', CORPUS]"], "has answers, and the other data is text: measure them one by one"),
        (
            ["data=['task:hops', CORPUS]", "chat_field=chat", "limit=9"],
            "limit=9 takes the first records of task:hops?s",
        ),
        (["data=task:hops?records=20", "sequence_length=9"], "no answers to measure in it"),
        (["data=task:hops?hop=3"], "unknown parameter of task:hops 'hop'"),
        (["data=task:hops", "num_recurrences=0"], "num_recurrences"),
        (["data=task:hops", "num_recurrences=2,1,2"], "num_recurrences=[2, 1, 2]: 2 stands twice; once is enough"),
        (["data=task:hops?hops=1,2&records=9"], "a comma ends a source; numbers of a task's parameter are joined by +"),
        (
            ["data=task:hops", "split=train"],
            "the split of a generated task stands in its source, as task:hops?split=held-out",
        ),
        (["data=CORPUS", "split=train"], "have no splits; name the files of the split"),
        (
            ["data=task:hops", "bad_records=skip"],
            "bad_records=skip has no effect: texts of a folder that are not UTF-8",
        ),
        (["data=CORPUS", "chat_field=chat"], "no field 'chat' among 'text'; chat_field names the one to use"),
        (
            ["data=CORPUS", "text_field=body", "sequence_length=64"],
            "no field 'body' among 'text'; text_field names the one to use",
        ),
        (["data=task:hops", "--out", "/nowhere/x.json"], "--out /nowhere/x.json: no such directory"),
        (["data=task:hops", "--out", "/"], "--out / is a directory"),
        (["data=CORPUS", "--out", "CORPUS"], "exists and is not a result of loopwise eval data=..; name another file"),
        (["data=CORPUS", "--out", "SCORES"], "exists and is not a result of loopwise eval data=..; name another file"),
        (
            ["data=~no-such-user/x.txt", "sequence_length=64"],
            "a path begins with ~, and no home is known",
        ),
        (["data=CORPUS", "--recipe", "typo.yaml"], "typo.yaml: no such recipe file"),
    ],
)
def test_what_cannot_be_measured(settings, message, small, corpus, tmp_path, capsys):
    scores = tmp_path / "scores.json"  # of tasks, which take hours
    scores.write_text(json.dumps({"settings": {}, "model": "m", "results": [{"score": 1}], "samples": []}))
    settings = [setting.replace("CORPUS", str(corpus)).replace("SCORES", str(scores)) for setting in settings]
    assert main(["eval", str(small), *settings]) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]


def test_a_file_that_comes_during_a_measurement_moves_aside(tmp_path, capsys):
    file = tmp_path / "result.json"
    for text in ("mine", '{"mine": 1}'):
        file.write_text(text)
        write_result(file, {"results": [1]})
    write_result(file, {"results": [2]})
    assert json.loads(file.read_text()) == {"results": [2]}
    assert (tmp_path / "result.json.kept").read_text() == "mine"
    assert (tmp_path / "result.json.kept-2").read_text() == '{"mine": 1}'
    assert capsys.readouterr().err.count("is not a result of Loopwise, so it is now result.json.kept") == 2


def test_a_full_disk_costs_neither_the_result_nor_an_earlier_one(small, tmp_path, capsys, monkeypatch):
    file = tmp_path / "result.json"
    measure = ["eval", str(small), f"data={TASK}", "num_recurrences=1", "--out", str(file)]
    run(measure)
    capsys.readouterr()
    before, write = file.read_bytes(), Path.write_text

    def full(self, text, *more, **named):
        write(self, text[: len(text) // 2], *more, **named)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert main(measure) == 2
    said = capsys.readouterr()
    assert "recurrences" in said.out
    assert said.err.splitlines()[-1] == f"loopwise: error: --out {file}: No space left on device"
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("result.json", before)]
    assert main([*measure[:-1], "/dev/null"]) == 0
    assert not Path("/dev/null").is_file()


def test_held_out_conversations_are_those_that_training_leaves_out(small, tmp_path, capsys):
    """eval_fraction selects the text that a training run holds out; the loss equals the run's own."""
    source, data = "task:hops?records=60", ["data.eval_fraction=0.2", "data.sequence_length=64"]
    settings = ["steps=1", "optimiser.learning_rate=1e-9", "batch_size=4", "recurrence.eval_at=2"]
    run(["train", str(small), str(tmp_path / "out"), f"data.train={source}", *data, *settings])
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    trained = next(record["eval_loss_r2"] for record in log if "eval_loss_r2" in record)
    keys = [f"data={source}", "eval_fraction=0.2", "sequence_length=64", "num_recurrences=2"]
    result = said(["eval", str(small), *keys], capsys)
    assert 10 <= result["records"] <= 13
    # A record does not see the ones before it here.
    assert result["results"][0]["loss"] == pytest.approx(trained, rel=0.2)


def test_a_loop_that_does_nothing_is_named(recurrent, short, tokenizer, tmp_path, capsys):
    """A model whose states stay constant, as the core's layers add nothing."""
    from safetensors.torch import load_file, save_file

    still = save_recurrent(tmp_path / "still", tokenizer, injection="none")
    tensors = load_file(still / "model.safetensors")
    for name in tensors:
        if name.startswith("core.") and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, still / "model.safetensors", {"format": "pt"})
    text = [f"data={short}", "sequence_length=32", "num_recurrences=8"]
    loop = said(["eval", str(still), *text], capsys)["loop"]
    assert loop["changes_nothing"] is True
    assert (loop["num_recurrences"], loop["gain"], loop["gain_error"]) == (8, 0, 0)
    assert loop["state_change"] == [0] * 7
    assert len({*loop["state_norm"]}) == 1
    run(["eval", str(still), *text])
    line = "the recurrences change nothing: R=1 and R=8 agree within noise; this model supports no claim about depth, "
    assert capsys.readouterr().out.splitlines()[-1] == line + "exits or waves"
    moving = said(["eval", str(recurrent), *text], capsys)["loop"]
    assert moving["changes_nothing"] is False
    model = load_model(str(recurrent)).eval()
    one = said(["eval", str(recurrent), *text[:2], "num_recurrences=1"], capsys)
    assert (one["loop"]["gain"], one["loop"]["changes_nothing"], one["loop"]["state_change"]) == (None, None, [])
    deep = said(["eval", str(recurrent), *text], capsys)["results"][0]["loss"]
    assert moving["gain"] == pytest.approx(one["results"][0]["loss"] - deep, abs=1e-6)
    ids = torch.tensor([[3, 5, 7, 9]])
    with torch.no_grad():
        states = model(input_ids=ids, num_recurrences=8, output_states=True, use_cache=False).states
    by_hand = Sequences([ids[0].numpy()], [np.ones(4, bool)], [])
    measured = depths.measure(model, by_hand, [8], tokens_per_batch=64)
    norm = states.norm(dim=-1)
    assert measured.states is not None
    assert measured.states.norm == pytest.approx(norm.mean((1, 2)).tolist(), rel=1e-5)
    change = ((states[1:] - states[:-1]).norm(dim=-1) / norm[1:]).mean((1, 2))
    assert measured.states.change == pytest.approx(change.tolist(), rel=1e-5)


def test_the_noise_is_paired_over_blocks():
    """A gain of 0.01 per token is noise if blocks differ by more, and significant if every block has it."""
    from loopwise.evaluation.result import loop_effect

    rng = np.random.default_rng(0)
    base, tokens = 100 + 30 * rng.standard_normal(50), np.full(50, 100)
    for spread, nothing in ((0.2, False), (20.0, True)):
        losses: dict[int | None, np.ndarray] = {1: base, 4: base - 1 + spread * rng.standard_normal(50)}
        found = loop_effect(depths.Measured(losses, tokens, {}, None))
        assert found["changes_nothing"] is nothing
        assert found["gain_error"] == pytest.approx(spread / 100 / math.sqrt(50), rel=0.3)
    one: dict[int | None, np.ndarray] = {1: base[:1], 4: base[:1]}
    alone = loop_effect(depths.Measured(one, tokens[:1], {}, None))
    assert (alone["gain"], alone["gain_error"], alone["changes_nothing"]) == (0, None, None)


def test_a_plain_model_and_its_answers(tmp_path, capsys):
    from loopwise.train.init import Init, init

    init("task:hops", tmp_path / "plain", Init(hidden_size=32, num_attention_heads=2))
    result = said(["eval", str(tmp_path / "plain"), f"data={TASK}", "group=kind"], capsys)
    assert result["loop"] is None
    assert [row["num_recurrences"] for row in result["results"]] == [None]
    groups = result["results"][0]["groups"]
    assert {name: group["answers"] for name, group in groups.items()} == {"chain": 30, "lookup": 10}


def test_pictures_of_measurements(small, recurrent, short, tmp_path, capsys):
    from matplotlib.image import imread

    from loopwise.evaluation.plot.evaluation import eval_figure

    run(["eval", str(small), f"data={TASK}", "group=hops", "num_recurrences=1,2,4", "--out", f"{tmp_path}/hops.json"])
    text = ["eval", str(recurrent), f"data={short}", "sequence_length=32", "num_recurrences=1,2"]
    run([*text, "--out", f"{tmp_path}/text.json"])
    for name in ("hops", "text"):
        run(["plot", "eval", str(tmp_path / f"{name}.json")])
        assert np.ptp(imread(tmp_path / f"{name}.png")) > 0.5
    result = json.loads((tmp_path / "hops.json").read_text())
    axes = eval_figure(tmp_path / "hops.json").axes[0]
    shares = [
        [100 * group["accuracy"] for group in row["groups"].values()] for row in (result["guess"], *result["results"])
    ]
    drawn: Any = axes.images[0].get_array()
    assert np.allclose(drawn, shares)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["guess", "1", "2", "4"]
    (tmp_path / "other.json").write_text("{}")
    for file in ("other.json", "nowhere.json"):
        assert main(["plot", "eval", str(tmp_path / file)]) == 2
    assert main(["plot", "eval", str(tmp_path / "hops.json"), "steps=3"]) == 2
    error = capsys.readouterr().err
    assert "other.json: not a result of loopwise eval (write one with --out)" in error
    assert "nowhere.json: No such file or directory" in error


def test_what_is_measured_is_checked():
    with pytest.raises(ValueError, match="group=hops groups right answers"):
        Evaluate(data=["x.txt"], group="hops")
    assert Evaluate(data=["x.jsonl"], chat_field="messages", group="hops").has_answers
