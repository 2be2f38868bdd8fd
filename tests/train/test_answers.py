"""Right answers by recurrences and group during training, and the diagnosis of the states."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loopwise import diagnosis
from loopwise.cli import main
from loopwise.diagnosis import States, state_sums
from loopwise.train.data import LEARN, START, Corpus, build
from loopwise.train.data.answers import Numbered
from loopwise.train.recipe import Data
from tests.helpers.train_tiny import run, save_recurrent

TASK = "task:hops?hops=1..3&questions=2&statements=8..16&records=60"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    from loopwise.train import tasks

    sizes = {"vocab_size": 41, "eos_token_id": 0}
    return save_recurrent(tmp_path_factory.mktemp("models") / "small", tasks.tokenizer("hops"), sizes)


def log_of(out: Path) -> dict[str, float]:
    """The last evaluation of a run."""
    records = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [record for record in records if "eval_loss_r1" in record][-1]


KEYS = ["steps=20", "optimiser.learning_rate=3e-2", "recurrence.eval_at=1,4"]  # enough to answer by digits
PACKED = {
    "whole and separate": ["packing_strategy=bfd", "separate_documents=true", "sequence_length=128"],
    "wrapped": ["sequence_length=128"],  # a record has 31 to 55 tokens, so that a third are cut
}


@pytest.mark.parametrize("name", PACKED)
def test_accuracies_are_those_of_eval(name, small, tmp_path, capsys):
    """Whatever the packing, each answer follows its own record alone: the same model, the same answers."""
    out = tmp_path / "out"
    keys = [f"data.eval={TASK}", "data.group=hops", *KEYS, *(f"data.{key}" for key in PACKED[name])]
    run(["train", str(small), str(out), "data.train=task:hops?records=20", *keys])
    said = capsys.readouterr().out
    log = log_of(out)
    assert main(["eval", str(out), f"data={TASK}", "group=hops", "num_recurrences=1,4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for row in result["results"]:
        name = f"eval_accuracy_r{row['num_recurrences']}"
        assert log[name] == pytest.approx(row["accuracy"], abs=1e-9)
        assert 0 < log[name] < 1
        groups = {group: log[f"{name}_{group}"] for group in row["groups"]}
        assert groups == pytest.approx({group: found["accuracy"] for group, found in row["groups"].items()})
        assert (
            f"R={row['num_recurrences']} {log[name.replace('accuracy', 'loss')]:.4f} ({100 * log[name]:.1f} % right)"
            in said
        )
    assert {name for name in log if "accuracy_r4" in name} == {
        "eval_accuracy_r4", *(f"eval_accuracy_r4_{n}" for n in range(4))
    }  # fmt: skip
    norms = [log[f"state_norm_r{r}"] for r in (1, 2, 3, 4)]
    assert norms == pytest.approx(result["loop"]["state_norm"], rel=0.2)  # of the first blocks only
    card = json.loads((out / "loopwise.json").read_text())
    assert card["held_out_accuracy"]["eval_accuracy_r4"] == log["eval_accuracy_r4"]
    assert f"| 4 | {log['eval_loss_r4']:.4f} | {100 * log['eval_accuracy_r4']:.1f} |" in (out / "README.md").read_text()


def test_text_has_no_answers_and_chats_have(recurrent, corpus, tokenizer, tmp_path):
    chats = tmp_path / "chats.jsonl"
    with chats.open("w") as file:
        for i in range(40):
            turns = [{"role": role, "content": f"{role[0]}{i}"} for role in ("user", "assistant") * 2]
            file.write(json.dumps({"messages": turns, "kind": ["one", "two"], "level": i % 3}) + "\n")
    common = {"train": [str(chats)], "chat_field": "messages", "eval_fraction": 0.3, "sequence_length": 24}
    for group, expected in (("kind", {"one", "two"}), ("level", {"0", "1", "2"}), (None, {None})):
        blocks = build(Data.model_validate({**common, "group": group}), tokenizer, tmp_path / f"{group}")
        assert blocks.answers is not None
        assert blocks.answers.alone is not None
        assert {*blocks.answers.groups} == expected
        for number in range(1, len(blocks.answers.groups) + 1):
            rows, places = np.nonzero(blocks.answers.numbers == number)
            said = tokenizer.decode(blocks.answers.alone.tokens[rows, places])
            assert said[0] == "a"
            assert said[1:].isdigit()
            if group == "level":
                assert blocks.answers.groups[number - 1] == str(int(said[1:]) % 3)
    texts = build(Data(train=[str(corpus)], eval_fraction=0.2, sequence_length=24), tokenizer, tmp_path / "texts")
    assert texts.answers is None
    mixed = {"train": [str(corpus)], "eval": [str(corpus), "task:parity?records=30"], "sequence_length": 32}
    blocks = build(Data.model_validate({**mixed, "group": "length"}), tokenizer, tmp_path / "mixed")
    assert blocks.answers is not None
    assert {*blocks.answers.groups} <= {*map(str, range(1, 9))}


def test_only_whole_answers_count():
    """In wrapped blocks, an answer that a block's end cuts, or that stands at its beginning, is not measured."""
    learned = [0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0]  # 4 answers, and EOS last
    corpus = Corpus(
        np.arange(20, dtype=np.int32),
        (np.array(learned) * LEARN + np.eye(1, 20, dtype=int)[0] * START).astype(np.uint8),
        np.array([20]),
        np.zeros(1, np.uint64),
    )
    numbered = Numbered.of(corpus, [["a", "b", "c", "d"]], "x")
    assert numbered.sizes.tolist() == [2, 1, 3, 2]
    found = numbered.in_blocks(numbered.numbers.reshape(5, 4))
    assert found is not None
    assert found.groups == ["a", "b", "d"]
    assert found.numbers.ravel().tolist() == [0, 0, 1, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 0]
    cut = numbered.in_blocks(numbered.numbers[:18].reshape(3, 6))
    assert cut is not None
    assert cut.groups == ["a"], "b stands at a beginning, c and d are cut"
    twice = Numbered.joined([numbered, numbered])
    assert twice.numbers.tolist() == [*numbered.numbers, *(n and n + 4 for n in numbered.numbers)]
    assert numbered.kept(np.arange(20) > 2).in_blocks(numbered.numbers[None, 3:]) is not None
    assert numbered.in_blocks(np.zeros((2, 3), np.int32)) is None


PACKINGS = [
    {},
    {"separate_documents": True},
    {"packing_strategy": "bfd"},
    {"packing_strategy": "bfd", "separate_documents": True},
    {"packing_strategy": "bfd_split", "separate_documents": True},
]


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_an_answer_counts_where_its_record_stands_before_it(packing, tmp_path, capsys):
    """Answers within 60 tokens of their record's beginning count, and no others do: records have 40 to 100 tokens."""
    from loopwise.train import tasks

    tokenizer = tasks.tokenizer("hops")
    source = "task:hops?hops=1..3&questions=4&statements=9..22&name_length=2&records=40&split=held-out"
    keys = {"train": ["task:hops?records=40"], "eval": [source], "sequence_length": 60, **packing}
    blocks = build(Data.model_validate(keys), tokenizer, tmp_path / "tokens")
    expected = []
    for record in tasks.parse(source).records():
        ids: list[int] = []
        for message in record["messages"]:
            ids += tokenizer(message["content"])["input_ids"]
            if message["role"] == "assistant" and len(ids) <= 60:
                expected.append(tuple(ids))
    assert blocks.answers is not None
    rows = blocks.answers.alone or blocks.held_out
    assert rows is not None
    found = []
    for number in range(1, len(blocks.answers.groups) + 1):
        numbered, places = np.nonzero(blocks.answers.numbers == number)
        row, place = numbered[0], places[-1]
        start = np.flatnonzero((rows.marks[row] & START > 0)[: place + 1])[-1]
        found.append(tuple(rows.tokens[row, start : place + 1].tolist()))
    assert sorted(found) == sorted(expected)
    assert 40 < len(expected) < 150
    left = 160 - len(expected)
    assert f"the held-out text: {left} of 160 answers are left out, as their records are cut" in capsys.readouterr().err


def test_no_answer_of_a_document_without_its_beginning_counts(tokenizer, tmp_path):
    """A single long document is held out by its end, whose beginning is trained on."""
    turns = [{"role": role, "content": f"{role[0]}{i}"} for i in range(50) for role in ("user", "assistant")]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": turns}))
    keys = {"train": [str(tmp_path / "long.jsonl")], "chat_field": "messages", "eval_fraction": 0.4}
    blocks = build(Data.model_validate({**keys, "sequence_length": 32}), tokenizer, tmp_path / "tokens")
    assert blocks.held_out is not None
    assert (blocks.held_out.marks & LEARN > 0).any()
    assert blocks.answers is None


def test_wrong_groups_are_named(small, corpus, tmp_path, capsys):
    start = ["train", str(small), str(tmp_path / "out"), "data.train=task:hops?records=20", "steps=1"]
    start.append("data.sequence_length=64")
    for more, message in (
        (["data.group=hops"], "data.group=hops has no effect: it groups right answers of held-out data; set data.eval"),
        (
            ["data.group=hop", "data.eval=task:hops"],
            "record 0: no field 'hop' to group by among 'messages', 'hops', 'k",
        ),
        (["data.group=hops", f"data.eval={corpus}"], "group=hops groups right answers, and text has none: give chat"),
    ):
        assert main([*start, *more]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def states(norms: list[float]) -> States:
    """Three tokens have states, the first of which is a thousand times longer and does not grow."""
    directions = torch.nn.functional.normalize(torch.randn(1, 3, 8, generator=torch.manual_seed(0)), dim=-1)
    sizes = torch.tensor([[[1000.0], [norm], [2 * norm]] for norm in norms])
    made = (directions * sizes)[:, None]
    return States.of(state_sums(made, torch.ones(1, 3, dtype=torch.bool)), 3)


def test_states_by_hand():
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(4, 2, 5, 8, generator=generator)
    real = torch.ones(2, 5, dtype=torch.bool)
    real[1, 3:] = False
    found = States.of(state_sums(made, real), 8)
    norm, change, growth = [], [], []
    for r in range(4):
        tokens = [(b, t) for b in range(2) for t in range(5) if real[b, t]]
        size = [made[r, b, t].norm().item() for b, t in tokens]
        norm.append(sum(size) / 8)
        if r:
            before = [made[r - 1, b, t].norm().item() for b, t in tokens]
            moved = [(made[r, b, t] - made[r - 1, b, t]).norm().item() for b, t in tokens]
            change.append(sum(m / s for m, s in zip(moved, size, strict=True)) / 8)
            growth.append(math.prod(s / o for s, o in zip(size, before, strict=True)) ** (1 / 8))
    assert found.norm == pytest.approx(norm, rel=1e-5)
    assert found.change == pytest.approx(change, rel=1e-5)
    assert found.growth == pytest.approx(growth, rel=1e-5)


def test_states_that_grow_without_bound_are_named():
    grown = states([1.24**r for r in range(1, 9)]).unbounded
    assert grown == pytest.approx(1.24 ** (2 / 3), rel=1e-3), "the long state does not grow"
    for bounded in ([1.0] * 8, [*range(1, 9)], [*range(1, 21)], [2 - 0.5**r for r in range(9)], [1.3, 1.7]):
        assert states([float(x) for x in bounded]).unbounded is None, bounded
    line = diagnosis.lines(False, 8, States([], [], [1.3, 1.25, 1.24, 1.24]))
    assert line == [
        "the states grow by a factor of 1.24 in each recurrence, without bound: latent-diff never fires below a "
        "threshold of 0.19; use exit_rule=cosine, or convert with a recurrence_norm"
    ]
    both = diagnosis.lines(True, 8, States([], [], [1.5] * 3))
    assert both[0].startswith("the recurrences change nothing: R=1 and R=8 agree within noise")
    assert len(both) == 2
    assert diagnosis.lines(None, 8, None) == []


def test_a_run_ends_with_its_diagnosis(tokenizer, corpus, tmp_path, capsys):
    """One model's core adds nothing, and another's doubles its state; eval prints the same lines."""
    from safetensors.torch import load_file, save_file

    cases = (
        (1.0, "the recurrences change nothing: R=1 and R=6 agree"),
        (2.0, "the states grow by a factor of 2.00 in each recurrence, without bound"),
    )
    for factor, line in cases:
        model = save_recurrent(tmp_path / f"{factor}", tokenizer)
        tensors = load_file(model / "model.safetensors")
        eye: Any = torch.eye(len(tensors["injection.weight"]))
        for key in tensors:
            if key.startswith("core.") and key.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[key] = torch.zeros_like(tensors[key])
        tensors["injection.weight"] = torch.cat([factor * eye, 0 * eye], 1)  # s_r = factor s_(r-1)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        out = tmp_path / f"{factor}-out"
        keys = [f"data.train={corpus}", "data.sequence_length=32", "data.eval_fraction=0.2", "steps=1"]
        run(["train", str(model), str(out), *keys, "recurrence.eval_at=1,6", "optimiser.learning_rate=1e-12"])
        printed = capsys.readouterr().out
        assert f"\n{line}" in printed
        assert "\n|s_r|, r = 1 ..: " in printed
        run(["inspect", str(out)])
        assert f"\n{line}" in (inspected := capsys.readouterr().out)
        assert [one for one in inspected.splitlines() if "|s_r" in one] == [
            x for x in printed.splitlines() if "|s_r" in x
        ]
        run(["eval", str(out), f"data={corpus}", "sequence_length=32", "limit=20", "num_recurrences=1,6"])
        assert f"\n{line}" in capsys.readouterr().out
