"""Chains of assignments: `c=b;a=7;x=4;b=a;` and then a question.

`?c=` asks for the digit at the end of the chain. The number of hops is the difficulty: here it is three, from c to b to
a to 7. `!c=` is a lookup: it asks for the right-hand side of c's statement, a letter or a digit, and counts as 0 hops.
"""

from __future__ import annotations

from typing import Any

from .parameters import Draws, Parameter, integer, numbers, share

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
VOCABULARY = (";", "?", "!", *LETTERS, *DIGITS)
SILENT = "="  # has no token

LINES = 21  # default statements and questions of a record: 3 tokens each, 64 with EOS
QUESTIONS = {1: 10, 2: 8, 3: 7, 4: 6, 5: 5}  # default number, by the most hops; 4 for more hops
LONGEST = 8  # most statements of a chain without a question

PARAMETERS = {
    "hops": Parameter(
        numbers(0, 26), tuple(range(1, 9)), "hops of a question, equally likely: 4, 1..8, 0+2+4..6; 0 is a lookup"
    ),
    "lookups": Parameter(share, 0.25, "share of the questions that are lookups, independent of hops"),
    "questions": Parameter(integer(1, 20), None, "questions of a record (default: by the most hops, 10 to 4)"),
    "statements": Parameter(numbers(1, 26), None, "statements of a record (default: 21 - questions, 64 tokens in all)"),
}


def settle(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the defaults that depend on other parameters. Raises ValueError for values without room."""
    hops, lookups = values["hops"], values["lookups"]
    needed = sum(hops) / len(hops) * (1 - lookups)  # statements of a question's chain, on average
    questions = values["questions"]
    if questions is None:
        questions = QUESTIONS.get(max(1, hops[-1]), 4)
        while questions > 1 and not _fit(questions, hops, needed, LINES - questions):
            questions -= 1
    statements = values["statements"] or (LINES - questions,)
    if hops[-1] > statements[0]:
        raise ValueError(f"a chain of {hops[-1]} hops needs as many statements, and a record may have {statements[0]}")
    if not _fit(questions, hops, needed, statements[0]):
        raise ValueError(
            f"{questions} questions about chains of {needed:g} statements on average do not fit into {statements[0]} "
            "statements; ask for fewer questions or hops, or for more statements"
        )
    return {**values, "questions": questions, "statements": statements}


def _fit(questions: int, hops: tuple[int, ...], needed: float, statements: int) -> bool:
    return questions <= statements and questions * needed <= statements and questions * hops[0] <= statements


def draw(values: dict[str, Any], draws: Draws, index: int) -> tuple[str, dict[str, Any]]:
    """(the program, record number `index`).

    A record with one question takes the values of `hops` in turn, so that groups have equal sizes; else hops are drawn.
    Every chain has at most one question. Lookups may ask for any statement.
    """
    hops, count = values["hops"], values["questions"]
    length = draws.pick(values["statements"])
    while True:
        asked = [hops[index % len(hops)]] if count == 1 else [draws.pick(hops) for _ in range(count)]
        asked = [0 if draws.uniform() < values["lookups"] else n for n in asked]
        if sum(asked) <= length:
            break
    statements, ends = _program(draws, [n for n in asked if n], length, min(LONGEST, hops[-1] or 4))
    looked_up = draws.sample(statements, asked.count(0))
    program = "".join(f"{name}={value};" for name, value in statements)
    messages, before = [], program
    for n in asked:
        name, answer = ends.pop() if n else looked_up.pop()
        question = f"{before}{'?' if n else '!'}{name}="
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        before = ""
    return program, {"messages": messages, "hops": asked, "kind": ["chain" if n else "lookup" for n in asked]}


def _program(
    draws: Draws, lengths: list[int], total: int, longest: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(statements, ends): `total` pairs (name, value) in random order, and (last name, digit) for each of `lengths`.

    ends: in reverse order. Chains of 1 to `longest` statements fill up the program.
    """
    chains = list(lengths)
    while (left := total - sum(chains)) > 0:
        chains.append(min(1 + draws.below(longest), left))
    names = draws.sample(LETTERS, total)
    statements, ends = [], []
    for chain in chains:
        links, names = names[:chain], names[chain:]
        digit = draws.pick(DIGITS)
        statements += zip(links, [digit, *links[:-1]], strict=True)
        ends.append((links[-1], digit))
    return draws.shuffled(statements), ends[: len(lengths)][::-1]
