"""Parameters of generated tasks, and answers compared with solvers of another kind."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest

from loopwise.errors import UserError
from loopwise.train import tasks
from loopwise.train.data import LEARN, build
from loopwise.train.data.tokens import PAD, START
from loopwise.train.recipe import Data


def taken(source: str, count: int) -> list[dict[str, Any]]:
    return list(itertools.islice(tasks.parse(source).records(), count))


def read(record: dict[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """([(name, text after =)] in order, [(question, answer)])."""
    asked, answers = (record["messages"][i::2] for i in (0, 1))
    *statements, first = asked[0]["content"].split(";")
    questions = [first, *(message["content"] for message in asked[1:])]
    entries = [tuple(statement.split("=")) for statement in statements]
    return entries, list(zip(questions, (message["content"] for message in answers), strict=True))


def matrix(permutation: str) -> np.ndarray:
    """The permutation matrix P with P e_i = e_p(i)."""
    made = np.zeros((5, 5), int)
    for i, image in enumerate(permutation):
        made[int(image) - 1, i] = 1
    return made


def s5(word: str) -> str:
    product = np.linalg.multi_dot([np.eye(5, dtype=int), *map(matrix, word.split(",")), np.eye(5, dtype=int)])
    return "".join(str(int(column.argmax()) + 1) for column in product.T)


def sums(word: str, modulo: int = 0) -> str:
    total = eval(word)  # Python's own arithmetic on the text
    while modulo and not 0 <= total < modulo:
        total += modulo if total < 0 else -modulo
    return ("-" if total < 0 else "+") + str(abs(total))


SOLVED = {
    "task:sums?questions=3": sums,
    "task:sums?length=2..5&digits=1..3&distractors=0..3&distractor_length=same&place=last": sums,
    "task:sums?modulo=7&length=1..12&questions=2": lambda word: sums(word, 7),
    "task:parity?length=1..30&questions=2": lambda word: str(int(word, 2).bit_count() % 2),
    "task:s5?questions=2": s5,
    "task:s5?length=1..3&distractors=1&names=c..f+x&place=first": s5,
}

ELEMENT = {"task:sums": r"[+-]\d+", "task:parity": "[01]", "task:s5": "[1-5]{5}"}


@pytest.mark.parametrize("source", SOLVED)
def test_values_of_words(source):
    wanted = tasks.parse(source).values
    lengths, values = set(), set()
    for record in taken(source, 150):
        entries, answered = read(record)
        words = dict(entries)
        assert len(words) == len(entries), "every name is given once"
        assert {*words} <= {*wanted["names"]}
        assert len(answered) == wanted["questions"]
        assert len(words) - len(answered) in wanted["distractors"]
        for (question, answer), length in zip(answered, record["length"], strict=True):
            word = words[question.strip("?=")]
            assert answer == SOLVED[source](word)
            assert len(re.findall(ELEMENT[source.partition("?")[0]], word)) == length
            lengths.add(length)
            values.add(answer)
        if wanted["place"] != "any":
            places = sorted(list(words).index(question.strip("?=")) for question, _ in answered)
            first = 0 if wanted["place"] == "first" else len(words) - len(answered)
            assert places == [*range(first, first + len(answered))]
    assert lengths == {*wanted["length"]}
    assert len(values) >= (2 if "parity" in source else 7)


def test_running_answers_are_the_values_of_all_beginnings():
    for source, separator in (("task:s5?length=4", ","), ("task:parity?length=9", "")):
        for last, running in zip(taken(source, 20), taken(f"{source}&answer=running", 20), strict=True):
            for record in (last, running):
                assert record["length"] == [record["length"][0]] * len(record["length"])
            entries, answered = read(running)
            for question, answer in answered:
                word = dict(entries)[question.strip("?=")]
                whole = word.split(",") if separator else list(word)
                parts = answer.split(",") if separator else list(answer)
                solve = s5 if separator else SOLVED["task:parity?length=1..30&questions=2"]
                assert parts == [solve(separator.join(whole[: i + 1])) for i in range(len(whole))]
    entries, answered = read(taken("task:sums?length=3&answer=running&questions=1", 1)[0])
    terms = re.findall(r"[+-]\d", entries[0][1])
    assert answered[0][1] == "".join(sums("".join(terms[: i + 1])) for i in range(3))


@pytest.mark.parametrize(
    ("source", "digest"),
    [
        ("task:sums?digits=1..2&distractors=1", "54a0e103343f3a17"),
        ("task:parity?split=held-out", "7ee73c094e6adcaf"),
        ("task:s5?answer=running&length=1..3", "6aeac81a620bdeb0"),
        ("task:hops?hops=2..5&distractors=2..3&order=forward&names=a..t", "49394b4faa5088cb"),
        ("task:hops?hops=2&questions=2&name_length=1..2&digits=distinct&place=first", "74f813bf4f800bb0"),
        ("task:hops?style=code&hops=1..3&statements=8..24", "ac19fc19058ff6e8"),
    ],
)
def test_records_are_the_same_everywhere(source, digest):
    """Values from Python 3.11."""
    assert hashlib.sha256(json.dumps(taken(source, 50)).encode()).hexdigest()[:16] == digest


def guesses(name: str, entries: list[tuple[str, str]], question: str, answer: str) -> list[str]:
    """All answers that a guess takes with equal probability."""
    if name == "parity":
        return ["".join(bits) for bits in itertools.product("01", repeat=len(answer))]
    if name == "s5":
        return ["".join(images) for images in itertools.permutations("12345")]
    ends = {end for _, end in entries}
    return sorted(ends if question[0] == "!" else ends & {*"0123456789"})


@pytest.mark.parametrize(
    "source",
    [
        "task:hops?hops=1..4+6&lookups=0.3",
        "task:hops?hops=1..8&lookups=0&questions=1&digits=distinct",
        "task:parity?length=2..6&questions=2",
        "task:parity?length=2..4&answer=running",
        "task:s5?length=2",
    ],
)
def test_the_chance_of_a_guess_is_that_of_one_among_all_that_fit(source):
    parsed = tasks.parse(source)
    for record in taken(source, 40):
        entries, answered = read(record)
        fit = [guesses(parsed.name, entries, question, answer) for question, answer in answered]
        assert all(answer in among for (_, answer), among in zip(answered, fit, strict=True))
        assert parsed.guess(record) == pytest.approx([1 / len(among) for among in fit])


def test_sums_have_no_simple_guess():
    parsed = tasks.parse("task:sums?modulo=7")
    assert parsed.guess(parsed.record(0)) is None


def chains(entries: list[tuple[str, str]]) -> dict[str, list[str]]:
    """{last name: the names from the digit on} of every chain."""
    values = dict(entries)
    used = {value for _, value in entries}
    found = {}
    for last in [name for name, _ in entries if name not in used]:
        path = [last]
        while values[path[0]] in values:
            path.insert(0, values[path[0]])
        found[last] = path
    return found


@pytest.mark.parametrize("more", ["", "&statements=10..24&questions=2", "&name_length=2&order=reverse"])
def test_code_is_python_with_the_same_chains(more):
    """Python itself computes what the programs print, and the same draws give other text only."""
    source = f"task:hops?style=code&hops=1..4{more}"
    for record in taken(source, 40):
        asked, answers = ([message["content"] for message in record["messages"][i::2]] for i in (0, 1))
        program, _, first = asked[0].rpartition("\n")
        lines = dict(line.split(" = ") for line in program.split("\n"))
        ordered: dict[str, str] = {}
        while len(ordered) < len(lines):  # a statement may stand before the one that it needs
            ordered |= {k: v for k, v in lines.items() if v.isdigit() or v in ordered}
        digits = {value for value in lines.values() if value.isdigit()}
        chances = [1 / len(digits if hops else {*lines.values()}) for hops in record["hops"]]
        assert tasks.parse(source).guess(record) == pytest.approx(chances)
        values: dict[str, Any] = {}
        exec("\n".join(f"{k} = {v}" for k, v in ordered.items()), values)
        questions = [first, *(question.removeprefix("\n") for question in asked[1:])]
        for question, answer, hops in zip(questions, answers, record["hops"], strict=True):
            if hops:
                name = question.removeprefix("print(").removesuffix(") # ")
                assert str(values[name]) == answer
            else:
                assert " " + lines[question.removeprefix("# ").removesuffix(" =")] == answer
        assert (
            "".join(x + y for x, y in zip(asked, answers, strict=True)).count("\n") == len(lines) + len(questions) - 1
        )


def test_records_are_plain_text_with_every_tokenizer(tokenizer, tmp_path):
    """A chat model's template takes no part, and the loss covers the answers and the EOS behind them."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    source = "task:hops?style=code&records=20&statements=8"
    record = taken(source, 1)[0]
    blocks = build(
        Data(train=[source], sequence_length=256, packing_strategy="bfd", separate_documents=True), chat, tmp_path
    ).train
    documents = [
        (ids, learned)
        for block in range(len(blocks))
        for ids, learned in pieces(blocks.tokens[block], blocks.marks[block])
    ]
    found = {chat.decode(ids[:-1]): (ids, learned) for ids, learned in documents}
    ids, learned = found["".join(message["content"] for message in record["messages"])]
    said = "".join(message["content"] for message in record["messages"][1::2])
    assert chat.decode(ids[learned][:-1]) == said
    assert ids[learned][-1] == chat.eos_token_id


def pieces(ids: np.ndarray, marks: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids, learned) of the documents of a block."""
    real = marks & PAD == 0
    starts = np.flatnonzero(marks & START)
    return [
        (ids[real][a:b], (marks[real][a:b] & LEARN) > 0)
        for a, b in itertools.pairwise([*starts.tolist(), int(real.sum())])
    ]


def test_distractors_of_hops():
    for record in taken("task:hops?hops=3..6&lookups=0&questions=1&distractors=1..3&distractor_hops=same", 80):
        entries, [(question, answer)] = read(record)
        made = chains(entries)
        assert {len(path) for path in made.values()} == {record["hops"][0]}
        assert len(made) - 1 in (1, 2, 3)
        assert dict(entries)[made[question.strip("?=")][0]] == answer
    sizes = set()
    for record in taken("task:hops?hops=4&lookups=0&questions=2&distractors=2&distractor_hops=1+7", 50):
        entries, answered = read(record)
        asked = {question.strip("?=") for question, _ in answered}
        made = chains(entries)
        assert len(made) == 4
        sizes |= {len(path) for last, path in made.items() if last not in asked}
    assert sizes == {1, 7}


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        ("hops=4&lookups=0&questions=1&distractor_hops=same", {4}),  # in 20 statements
        ("hops=1+2+4+5&lookups=0.2&questions=1&distractor_hops=same", None),
        ("hops=3&questions=4&lookups=0&statements=12..21&distractor_hops=1..3", {1, 2, 3}),
        ("hops=2+4&questions=2&lookups=0&statements=18&distractor_hops=2", {2}),
    ],
)
def test_distractors_that_fill_a_record(source, sizes):
    """No chain has another size than asked for: chains that would be cut are refused."""
    for record in taken(f"task:hops?{source}", 60):
        entries, answered = read(record)
        asked = {question.strip("?=") for question, _ in answered}
        others = {len(path) for last, path in chains(entries).items() if last not in asked}
        if sizes is None:
            assert others == {*record["hops"]} or record["hops"] == [0]
        else:
            assert others <= sizes


def test_digits_of_hops():
    for record in taken("task:hops?hops=1..2&questions=2&statements=20&digits=distinct", 60):
        digits = [value for _, value in read(record)[0] if value.isdigit()]
        assert len({*digits}) == min(10, len(digits))
    plain = [[v for _, v in read(r)[0] if v.isdigit()] for r in taken("task:hops?hops=1..2&statements=20", 60)]
    assert any(len({*digits}) < min(10, len(digits)) for digits in plain)


def test_names_of_hops():
    for record in taken("task:hops?hops=1..2&names=a..m+z&statements=13..14", 40):
        assert {name for name, _ in read(record)[0]} <= {*"abcdefghijklmz"}
    lengths = set()
    for record in taken("task:hops?hops=1..2&names=a..h&name_length=2..3&statements=30", 40):
        names = [name for name, _ in read(record)[0]]
        assert len({*map(len, names)}) == 1
        assert len({*names}) == 30
        lengths.add(len(names[0]))
    assert lengths == {2, 3}


def test_order_and_place_of_hops():
    def in_order(entries: list[tuple[str, str]], path: list[str]) -> bool:
        names = [name for name, _ in entries]
        places = [names.index(name) for name in path]
        return places == [*range(places[0], places[0] + len(path))]

    keys = "hops=4&lookups=0&questions=2&statements=20"
    for record in taken(f"task:hops?{keys}&order=forward", 30):
        entries, _ = read(record)
        assert all(in_order(entries, path) for path in chains(entries).values())
    for record in taken(f"task:hops?{keys}&order=reverse", 30):
        entries, _ = read(record)
        assert all(in_order(entries[::-1], path) for path in chains(entries).values())
    both = [read(record)[0] for record in taken(f"task:hops?{keys}&order=forward+reverse", 60)]
    forward = sum(all(in_order(entries, path) for path in chains(entries).values()) for entries in both)
    assert 15 < forward < 45
    for order in ("shuffled", "forward"):
        for place, part in (("first", slice(0, 8)), ("last", slice(12, 20))):
            for record in taken(f"task:hops?{keys}&order={order}&place={place}", 20):
                entries, answered = read(record)
                asked = {name for question, _ in answered for name in chains(entries)[question.strip("?=")]}
                assert {name for name, _ in entries[part]} == asked


def test_one_tokenizer_for_all_but_hops(tmp_path):
    tokenizer = tasks.tokenizer("sums")
    assert tokenizer.get_vocab() == tasks.tokenizer("s5").get_vocab()
    common = tasks.tokenizer("hops").get_vocab()
    assert {token: i for token, i in tokenizer.get_vocab().items() if token in common} == common
    for source in (*SOLVED, "task:hops"):
        blocks = build(
            Data(train=[f"{source}{'&' if '?' in source else '?'}records=40"], sequence_length=64),
            tokenizer,
            tmp_path / "t",
        )
        assert tokenizer.unk_token_id not in blocks.train.tokens


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("task:hops?names=a..F", "names=a..F: letters, as a..z or a..m+x, from a to z"),
        ("task:hops?names=f..a", "names=f..a: letters, as a..z"),
        ("task:hops?names=a..h", "17 statements need as many names, and there are 8; give more letters"),
        ("task:hops?distractors=2&statements=9", "distractors and statements both set the number of statements: give"),
        ("task:hops?hops=8&questions=1&distractors=3&distractor_hops=8", "1 questions and 3 distractors may need 32"),
        ("task:hops?hops=0&questions=5&distractors=1&distractor_hops=2", "5 questions look up more statements than th"),
        (
            "task:hops?hops=3&lookups=0&questions=1&distractor_hops=same",
            "chains of these distractor_hops do not always fill 20 statements; give their number as distractors=N",
        ),
        (
            "task:hops?hops=1..2&statements=9..12&questions=2&distractor_hops=same",
            "do not always fill 9 to 12 ",
        ),
        ("task:hops?hops=3&distractor_hops=7..9", "chains of these distractor_hops do not always fill 16 statements"),
        (
            "task:hops?hops=0..4&lookups=0&questions=1&distractors=0",
            "hops=0 looks up a statement, and one question with distractors=0 leaves none",
        ),
        ("task:hops?questions=1&distractors=0&distractor_hops=5", "distractor_hops has no effect: distractors is 0"),
        ("task:hops?questions=1&distractors=0&place=first", "place has no effect: distractors is 0"),
        ("task:hops?hops=3&statements=18&questions=1&distractor_hops=5", "distractor_hops do not always fill 18 stat"),
        ("task:parity?distractor_length=3", "distractor_length has no effect: distractors is 0; give distractors=N"),
        ("task:s5?place=last", "place has no effect: distractors is 0, so that all words are asked for"),
        ("task:hops?distractor_hops=all", "distractor_hops=all: same, or a whole number, a range as 1..8"),
        ("task:hops?order=backward", "order=backward: one of shuffled, forward, reverse, or several of these joined"),
        ("task:sum", "unknown task 'sum': did you mean 'sums'? choose from hops, parity, s5, sums"),
        ("task:s5?length=0", "length=0: a whole number, a range"),
        ("task:parity?questions=4&names=a..c", "4 words need as many names, and there are 3; ask for fewer questions"),
        ("task:sums?modulo=1", "modulo=1: a whole number, 2 to 1000000"),
    ],
)
def test_wrong_parameters_are_named(source, message):
    with pytest.raises(UserError) as raised:
        tasks.parse(source)
    assert message in str(raised.value)


def test_a_split_without_a_problem_is_named():
    with pytest.raises(UserError, match="task:parity: 2000 draws gave no held-out problem; ask for longer or more"):
        taken("task:parity?length=1&questions=1&names=a&split=held-out", 1)
