"""Generated tasks: their records, which depend on source and number only, and their use as sources."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from loopwise.cli import main
from loopwise.errors import UserError
from loopwise.evaluation.answers import conversations
from loopwise.evaluation.recipe import Evaluate
from loopwise.train import tasks
from loopwise.train.data import LEARN, build
from loopwise.train.data.stream import Mark, Stream
from loopwise.train.recipe import Data
from loopwise.train.tasks import hops
from tests.helpers.repository import ROOT
from tests.helpers.train_tiny import run, same


def taken(source: str, count: int) -> list[dict]:
    return list(itertools.islice(tasks.parse(source).records(), count))


def text(record: dict) -> str:
    return "".join(message["content"] for message in record["messages"])


def solved(program: dict[str, str], question: str) -> tuple[str, int]:
    """The answer to `?c=` or `!c=`, and the number of its hops."""
    sign, name = question[0], question[1]
    if sign == "!":
        return program[name], 0
    hops = 0
    while name in program:
        name, hops = program[name], hops + 1
    return name, hops


@pytest.mark.parametrize(
    ("source", "digest"),
    [
        ("task:hops", "49c3f5faa0b5f315"),
        ("task:hops?hops=0&seed=7&split=held-out", "9ed66a22e87dac33"),
        ("task:hops?hops=0+2..4+9&lookups=0.5&questions=3&statements=12..20", "238c35a0c5c2e781"),
    ],
)
def test_records_are_the_same_everywhere(source, digest):
    """Values from Python 3.11. Every other release, and every other way to draw, must give them, too."""
    records = taken(source, 50)
    assert hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16] == digest
    alone = tasks.parse(source).record(31)
    assert alone == records[31]


def test_answers_and_hops_are_right():
    for source in ("task:hops", "task:hops?hops=0+3..5&questions=2&lookups=0.1&statements=8..24", "task:hops?hops=0"):
        wanted = tasks.parse(source).values
        found, lengths = set(), set()
        for record in taken(source, 100):
            asked, answers = (record["messages"][i::2] for i in (0, 1))
            first = asked[0]["content"].split(";")
            statements = [statement.split("=") for statement in first[:-1]]
            program = dict(statements)
            assert len(program) == len(statements), "every name is assigned once"
            lengths.add(len(statements))
            questions = [first[-1], *(message["content"] for message in asked[1:])]
            assert len(questions) == len(set(questions)) == wanted["questions"]
            right = [solved(program, question) for question in questions]
            assert [answer for answer, _ in right] == [message["content"] for message in answers]
            assert [hops for _, hops in right] == record["hops"]
            assert record["kind"] == ["chain" if hops else "lookup" for hops in record["hops"]]
            found |= {*record["hops"]}
        assert found == {0, *wanted["hops"]}
        assert lengths <= {*wanted["statements"]}
        assert len(lengths) > 10 or len(wanted["statements"]) == 1


def test_records_of_the_defaults_fill_a_block_of_64_tokens(tmp_path):
    tokenizer = tasks.tokenizer("hops")
    for most in (0, *range(1, 9)):
        source = f"task:hops?hops={'0' if most == 0 else f'1..{most}'}&records=40"
        blocks = build(Data(train=[source], sequence_length=64), tokenizer, tmp_path / str(most)).train
        assert len(blocks) == 40
        assert (blocks.tokens[:, -1] == tokenizer.eos_token_id).all()
        assert (blocks.tokens[:, :-1] != tokenizer.eos_token_id).all()
        questions = tasks.parse(source).values["questions"]
        learned = (blocks.marks & LEARN) > 0
        assert learned[:, -1].all()  # the EOS, as the assistant has the last word
        learned[:, -1] = False
        assert (learned.sum(1) == questions).all()
        for record, ids, said in zip(taken(source, 40), blocks.tokens, learned, strict=True):
            assert tokenizer.decode(ids[said]) == "".join(m["content"] for m in record["messages"][1::2])
            assert tokenizer.decode(ids[:-1]) == text(record).replace("=", "")
    assert tokenizer("c=A")["input_ids"][-1] == tokenizer.unk_token_id


def test_one_question_takes_the_hops_in_turn():
    records = taken("task:hops?hops=0+2+5&questions=1&lookups=0", 9)
    assert [record["hops"] for record in records] == [[0], [2], [5]] * 3


def test_no_problem_is_trained_on_and_held_out():
    """Each of the 260 programs of one statement is in exactly one split, under every seed."""
    programs = {
        split: {text(r)[:4] for seed in (0, 1) for r in taken(f"{ONE}&seed={seed}&split={split}", 1500)}
        for split in ("train", "held-out")
    }
    assert not programs["train"] & programs["held-out"]
    assert len(programs["train"] | programs["held-out"]) == 260
    assert 20 < len(programs["held-out"]) < 50
    assert taken("task:hops?seed=1", 1) != taken("task:hops", 1)


ONE = "task:hops?hops=1&statements=1&questions=1"


def test_the_split_is_that_of_the_place(corpus, tmp_path, capsys):
    data = Data(train=["task:hops?hops=1..2", str(corpus)], eval=["task:hops", f"{ONE}&split=train"])
    assert data.train == ["task:hops?hops=1..2&split=train", str(corpus)]
    assert data.eval == ["task:hops?split=held-out", f"{ONE}&split=train"]
    assert Evaluate(data=["task:hops"]).data == ["task:hops?split=held-out"]
    assert Evaluate(data=["task:hops"], eval_fraction=0.1).data == ["task:hops?split=train"]
    for settings in (
        ["data.train=task:hops?split=held-out"],
        ["data.phases=[{share: 1, sources: {'task:hops?split=held-out': 1}}]"],
    ):
        assert main(["train", "model", str(tmp_path / "out"), *settings, "steps=1"]) == 2
        assert "are not trained on; split=held-out is for data.eval and eval" in capsys.readouterr().err


def test_lists_name_nothing_twice_and_no_part_of_a_task(tmp_path, capsys):
    for settings, message in (
        (["data.train=task:hops?hops=1,2..4"], "hops=1,2..4: a comma ends a source; numbers of a task's parameter are"),
        (["data.train=task:hops", "recurrence.eval_at=1,3,1"], "recurrence.eval_at=[1, 3, 1]: 1 stands twice"),
        (["data.train=task:hops", "optimiser.train=core,core"], "optimiser.train=['core', 'core']: core stands twice"),
        (["data.train=task:hops", "report_to=wandb,wandb"], "report_to=['wandb', 'wandb']: wandb stands twice"),
        (["data.train=task:hops", "adapters.targets=q,q"], "adapters.targets=['q', 'q']: q stands twice"),
        (
            ["data.train=task:hops", "data.split=train"],
            "the split of a generated task stands in its source, as task:hops?sp",
        ),
    ):
        assert main(["train", "model", str(tmp_path / "out"), *settings, "steps=1"]) == 2
        assert message in capsys.readouterr().err
    recipe = {"train": ["task:hops?hops=1", "task:hops?hops=2"]}
    assert Data.model_validate(recipe).train == [f"{source}&split=train" for source in recipe["train"]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("task:hop", "unknown task 'hop': did you mean 'hops'? choose from hops, parity, s5, sums"),
        (
            "task:hops?hop=3",
            "unknown parameter of task:hops 'hop': did you mean 'hops'? choose from digits, distract",
        ),
        (
            "task:hops?hops=0..27",
            "hops=0..27: a whole number, a range as 1..8, or several of these joined by +, from 0",
        ),
        ("task:hops?hops=5..2", "hops=5..2: a whole number, a range"),
        ("task:hops?hops=", "hops=: a whole number, a range"),
        ("task:hops?lookups=2", "lookups=2: a number from 0 to 1"),
        ("task:hops?records=0", "records=0: a whole number, at least 1"),
        ("task:hops?split=test", "split=test: one of train, held-out"),
        ("task:hops?seed=1&seed=2", "seed is given twice"),
        ("task:hops?hops=9&statements=8..24", "a chain of 9 hops needs as many statements, and a record may have 8"),
        (
            "task:hops?style=code&names=i+n&name_length=2&hops=1&statements=4&questions=1",
            "4 statements need as many names, and there are 3; give more letters",  # `in` is a word of Python's
        ),
        ("task:hops?hops=8&questions=4", "4 questions about chains of 6 statements on average do not fit into 17"),
    ],
)
def test_wrong_sources_are_named(source, message, tmp_path, capsys):
    with pytest.raises(UserError) as raised:
        tasks.parse(source)
    assert message in str(raised.value)
    assert main(["train", "model", str(tmp_path / "out"), f"data.train={source}", "steps=1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "out").exists()


def test_a_task_stands_beside_text(corpus, tokenizer, tmp_path):
    """All tokens of text are learned, and the answers of tasks; streamed or not, the records are the same."""
    source = "task:hops?records=20&split=train"
    keys = {"phases": [{"share": 1, "sources": {source: 1, str(corpus): 1}}], "sequence_length": 32}
    blocks = build(Data.model_validate(keys), tokenizer, tmp_path / "tokens")
    learned = (blocks.train.marks & LEARN) > 0
    answers = sum(len(record["hops"]) + 1 for record in taken(source, 20))  # and the EOS of each record
    # A block of byte-level tokens that is left over at the end is dropped.
    assert answers - 8 < learned[: blocks.parts[0]].sum() <= answers
    assert learned[blocks.parts[0] :].all()
    streamed = Data.model_validate({**keys, "streaming": [source], "window": 20})
    stream = Stream([source], streamed, tokenizer, 0, None)
    rows = [stream.row(i) for i in range(blocks.parts[0])]
    assert sorted(row["input_ids"].tolist() for row in rows) == sorted(blocks.train.tokens[: blocks.parts[0]].tolist())


def test_a_stream_of_a_task_goes_on_where_its_mark_says():
    tokenizer = tasks.tokenizer("hops")
    data = Data.model_validate({"train": ["task:hops?records=50"], "streaming": True, "sequence_length": 64})
    data = data.model_copy(update={"window": 7})
    whole = Stream(data.train, data, tokenizer, 0, None)
    expected = [whole.row(i)["input_ids"].tolist() for i in range(120)]
    assert len({tuple(block) for block in expected}) == 50, "each of the 50 records before any comes again"
    for place in (0, 13, 49, 50, 101):
        first = Stream(data.train, data, tokenizer, 0, None, behind=8)
        for i in range(place + 3):
            first.row(i)
        mark = Mark(**json.loads(json.dumps(asdict(first.mark(place)))))
        second = Stream(data.train, data, tokenizer, 0, mark)
        assert [second.row(i)["input_ids"].tolist() for i in range(place, 120)] == expected[place:]


def test_init_writes_an_untrained_model_that_trains(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sizes = ["num_hidden_layers=1", "hidden_size=32", "num_attention_heads=2", "num_key_value_heads=1"]
    run(["init", "task:hops", str(tmp_path / "one"), *sizes, "seed=3"])
    assert "untrained model of" in capsys.readouterr().out
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (model.config.intermediate_size, model.config.num_key_value_heads) == (64, 1)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.3, rel=0.1)
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.08, rel=0.1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert model.config.vocab_size == len(tokenizer) == 41
    record = taken("task:hops", 1)[0]
    assert tokenizer.apply_chat_template(record["messages"], tokenize=False) == text(record)
    run(["init", str(tmp_path / "one"), str(tmp_path / "two"), *sizes, "seed=3"])  # a directory that has a tokenizer
    assert same(tmp_path / "one", tmp_path / "two")
    run(["init", "task:hops", str(tmp_path / "three"), *sizes])
    assert not same(tmp_path / "one", tmp_path / "three")
    settings = ["data.train=task:hops?records=64", "data.sequence_length=64", "steps=3"]
    run(["train", str(tmp_path / "one"), str(tmp_path / "out"), *settings])
    assert not same(tmp_path / "one", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task:hop", "OUT"], "unknown task 'hop'"),
        (["nowhere/x/y", "OUT"], "nowhere/x/y: no such directory, and no model of the hub"),
        (["task:hops", "."], "OUT is '.'; name a directory to be made"),
        (["task:hops", "mine"], "mine is a file; give a directory for the output"),
        (["task:hops", "mine/out"], "mine, and that is no directory; choose another directory"),
        (["task:hops", "../here"], "here holds the current directory and would replace it"),
        (["task:hops", "OUT", "hidden_size=100"], "hidden_size=100 is not 2 x num_attention_heads=4 x a whole number"),
        (["task:hops", "OUT", "num_key_value_heads=3"], "num_key_value_heads=3 does not divide num_attention_heads=4"),
        (["task:hops", "OUT", "layers=3"], "unknown recipe key 'layers'"),
    ],
)
def test_init_says_what_is_wrong(arguments, message, tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "mine").touch()
    assert main(["init", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["mine"]


def test_init_replaces_what_is_ours_alone(tmp_path, capsys):
    """The rule of convert: replaced with --force only, and only with a record, and never the tokenizer's folder."""
    sizes = ["hidden_size=16", "num_attention_heads=2", "num_hidden_layers=1"]
    out, mine = tmp_path / "out", tmp_path / "mine"
    run(["init", "task:hops", str(out), *sizes])
    mine.mkdir()
    (mine / "precious").touch()
    for arguments, message in (
        ([out], "out is not empty; choose another directory, or replace it with --force"),
        ([mine, "--force"], "--force replaces only what Loopwise wrote"),
        ([out / "deeper", str(out)], "lies in the source"),
    ):
        source = arguments[1] if arguments[1:] and arguments[1] != "--force" else "task:hops"
        options = [x for x in arguments[1:] if x == "--force"]
        assert main(["init", source, str(arguments[0]), *sizes, *options]) == 2
        assert message in capsys.readouterr().err
    run(["init", "task:hops", str(out), *sizes, "seed=3", "--force"])
    assert json.loads((out / "loopwise.json").read_text())["init"]["seed"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize("most", [4, 8])
def test_lookups_and_hops_are_drawn_until_they_fit(most):
    """The shares of all lists of hops that fit, each as likely as it is drawn."""
    source = f"task:hops?hops=1..{most}"
    values = tasks.parse(source).values
    exact = np.zeros(most + 1)
    for asked in itertools.product(range(most + 1), repeat=values["questions"]):
        if sum(asked) <= values["statements"][0]:
            exact += np.bincount(asked, minlength=most + 1) * math.prod(0.75 / most if n else 0.25 for n in asked)
    exact /= exact.sum()
    hops = np.concatenate([record["hops"] for record in taken(source, 1500)])
    assert np.bincount(hops) / len(hops) == pytest.approx(exact, abs=0.015)
    if most == 8:
        page = (ROOT / "docs/reference/training.md").read_text()
        assert (
            f"{100 * exact[0]:.1f} % are lookups, {100 * exact[1]:.1f} % have 1 hop, {100 * exact[8]:.1f} % have 8"
            in page
        )


def test_lookups_and_hops_of_one_question_are_drawn_as_asked():
    records = taken("task:hops?questions=1", 1600)
    shares = np.bincount([record["hops"][0] for record in records]) / 1600
    assert shares == pytest.approx([0.25, *[0.75 / 8] * 8], abs=0.03)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("hops", "task:sums?records=20", "'; use the one of `loopwise init task:sums OUT`"),
        ("hops", "task:s5?length=2&records=20", "no token for ','; use the one of `loopwise init task:s5 OUT`"),
        ("sums", "task:hops?style=code&records=20", "no token for ' '; use that of a pretrained model, as style=c"),
    ],
)
def test_a_tokenizer_without_a_character_is_refused(name, source, message, tmp_path):
    """In training, streamed or not, and in measurements."""
    tokenizer = tasks.tokenizer(name)
    data = Data(train=[source], bad_records="skip")
    for read in (
        lambda: build(data, tokenizer, tmp_path / "tokens"),
        lambda: Stream(data.train, data, tokenizer, 0, None).row(0),
        lambda: conversations(Evaluate(data=[source]), tokenizer),
    ):
        with pytest.raises(UserError) as raised:
            read()
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_source_whose_chains_never_fit_ends(monkeypatch):
    monkeypatch.setattr(hops, "TRIES", 1)
    with pytest.raises(UserError, match="task:hops: 1 draws gave no chains that fit; ask for fewer questions or hops"):
        taken("task:hops", 100)


def test_a_step_without_an_answer_has_no_loss(tmp_path):
    """Half of the blocks of 32 tokens hold statements only, without a learned token."""
    out = tmp_path / "out"
    run(["init", "task:hops", str(tmp_path / "empty"), "hidden_size=32", "num_attention_heads=2"])
    keys = ["data.train=task:hops?records=50", "data.sequence_length=32", "batch_size=1", "steps=6", "log_every=1"]
    run(["train", str(tmp_path / "empty"), str(out), *keys])
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in history if "loss" in row]
    assert len(losses) == 6
    assert min(losses) == 0 < max(losses) < 10
