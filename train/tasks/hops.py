"""Chains of assignments: `c=b;a=7;x=4;b=a;` and then a question.

`?c=` asks for the digit at the end of the chain. The number of hops is the difficulty: here it is three, from c to b to
a to 7. `!c=` is a lookup: it asks for the right-hand side of c's statement, a name or a digit, and counts as 0 hops.

With style=code the same problem is a program of Python, one statement a line, for models of real text. `print(c) # `
asks for the digit, and `# c =` is a lookup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loopwise.errors import UserError

from .parameters import Draws, Parameter, choice, choices, conversation, either, integer, letters, numbers, share

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
VOCABULARY = (";", "?", "!", *LETTERS, *DIGITS)
SILENT = "="  # has no token

LINES = 21  # default statements and questions of a record: 3 tokens each, 64 with EOS
QUESTIONS = {1: 10, 2: 8, 3: 7, 4: 6, 5: 5}  # default number, by the most hops; 4 for more hops
LONGEST = 8  # most statements of a chain without a question
SAME = "same"
TRIES = 10_000  # draws of a record's chains; a few suffice
KEYWORDS = {"as", "if", "in", "is", "or", "and", "def", "del", "for", "not", "try"}  # Python's, of at most 3 letters

PARAMETERS = {
    "hops": Parameter(
        numbers(0, 26),
        tuple(range(1, 9)),
        "hops of a question: 4, 1..8, 0+2+4..6; 0 is a lookup. They are drawn equally often, but a record whose chains "
        "do not fit is drawn again, so that many hops come less often; with one question, all come equally often",
    ),
    "lookups": Parameter(
        share,
        0.25,
        "share of the questions that are drawn as lookups; as lookups fit more often, their share is larger",
    ),
    "questions": Parameter(integer(1, 20), None, "questions of a record (default: by the most hops, 10 to 4)"),
    "statements": Parameter(numbers(1, 99), None, "statements of a record (default: 21 - questions, 64 tokens in all)"),
    "names": Parameter(letters, tuple(LETTERS), "letters of the names: a..z, a..m+x", later=True),
    "name_length": Parameter(numbers(1, 3), (1,), "letters of a name; one number a record", later=True),
    "distractors": Parameter(
        numbers(0, 26),
        None,
        "chains that are not asked for, in place of statements (default: as many as fill the record)",
        later=True,
    ),
    "distractor_hops": Parameter(
        either(SAME, numbers(1, 26)),
        None,
        "statements of such a chain, or same: as many as a chain that is asked for; these must fill the record, or "
        "distractors gives their number (default: 1 to the most hops, at most 8, and the last chain is cut)",
        later=True,
    ),
    "digits": Parameter(
        choice("any", "distinct"), "any", "any, or distinct: the first ten chains end in different digits", later=True
    ),
    "order": Parameter(
        choices("shuffled", "forward", "reverse"),
        ("shuffled",),
        "order of a chain's statements: shuffled over the record, forward (a=7;b=a;) or reverse; several joined by +",
        later=True,
    ),
    "place": Parameter(
        choice("any", "first", "last"), "any", "where the chains that are asked for stand in the record", later=True
    ),
    "style": Parameter(
        choice("letters", "code"),
        "letters",
        "letters: one token a letter, as c=b;?c=7; code: lines of Python, as c = b and print(c) # 7",
        later=True,
    ),
}


def settle(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the defaults that depend on other parameters. Raises ValueError for values without room."""
    hops, lookups = values["hops"], values["lookups"]
    needed = sum(hops) / len(hops) * (1 - lookups)  # statements of a question's chain, on average
    names = _count_names(values)
    if values["distractors"] is not None:
        return _settle_distractors(values, needed, names)
    questions, given = values["questions"], values["statements"]
    if questions is None:
        questions = QUESTIONS.get(max(1, hops[-1]), 4)
        while questions > 1 and not _fit(questions, hops, needed, LINES - questions):
            questions -= 1
        while given and questions > 1 and not _fit(questions, hops, needed, given[0]):
            questions -= 1
    statements = given or (LINES - questions,)
    if hops[-1] > statements[0]:
        raise ValueError(f"a chain of {hops[-1]} hops needs as many statements, and a record may have {statements[0]}")
    if not _fit(questions, hops, needed, statements[0]):
        raise ValueError(
            f"{questions} questions about chains of {needed:g} statements on average do not fit into {statements[0]} "
            "statements; ask for fewer questions or hops, or for more statements"
        )
    if statements[-1] > names:
        raise ValueError(f"{statements[-1]} statements need as many names, and there are {names}; give more letters")
    if not _fills(values, questions, statements):
        raise ValueError(
            f"chains of these distractor_hops do not always fill {_range(statements)} statements; give their number as "
            "distractors=N, in place of statements"
        )
    return {**values, "questions": questions, "statements": statements}


def _fit(questions: int, hops: tuple[int, ...], needed: float, statements: int) -> bool:
    return questions <= statements and questions * needed <= statements and questions * hops[0] <= statements


def _fills(values: dict[str, Any], questions: int, statements: tuple[int, ...]) -> bool:
    """True if chains of `distractor_hops` fill every record behind those that are asked for, none with another size."""
    given, hops = values["distractor_hops"], values["hops"]
    asked = [n for n in hops if n]
    if isinstance(given, str):  # SAME
        return (questions == 1 or len(asked) == 1) and not any(total % n for n in asked for total in statements)
    if given is None or given == tuple(range(1, len(given) + 1)):  # the chain that is cut is of such a size
        return True
    if len(given) > 1:
        return False
    if questions == 1:
        used = {*asked, 0} if values["lookups"] or 0 in hops else {*asked}
        return not any((total - n) % given[0] for n in used for total in statements)
    return not any(n % given[0] for n in (*asked, *statements))


def _range(numbers: tuple[int, ...]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least} to {most}" if most > least else str(least)


def _settle_distractors(values: dict[str, Any], needed: float, names: int) -> dict[str, Any]:
    """`settle` for a given number of distractors, from which the number of statements follows."""
    if values["statements"] is not None:
        raise ValueError("distractors and statements both set the number of statements: give one")
    hops, distractors = values["hops"], values["distractors"]
    if distractors[-1] == 0:
        if values["distractor_hops"] is not None:
            raise ValueError("distractor_hops has no effect: distractors is 0")
        if values["place"] != "any":
            raise ValueError("place has no effect: distractors is 0, so that all chains are asked for")
    sizes = [n for n in hops if n] if values["distractor_hops"] == SAME else []
    sizes = sizes or _distractor_hops(values, [])
    each = sum(sizes) / len(sizes) * sum(distractors) / len(distractors)
    zero = 1 - sum(n > 0 for n in hops) / len(hops) * (1 - values["lookups"])  # share of lookups
    questions = values["questions"] or QUESTIONS.get(max(1, hops[-1]), 4)
    least = 1 if values["questions"] is None else questions
    while questions > least and questions * needed + each > names:
        questions -= 1
    most = max(questions * needed + each, hops[-1] + max(sizes) * distractors[-1])
    if most > names:
        raise ValueError(
            f"{questions} questions and {distractors[-1]} distractors may need {most:g} names, and there are {names}; "
            "ask for fewer or shorter chains, or give more letters"
        )
    if questions == 1 and 0 in hops and not distractors[-1]:
        raise ValueError("hops=0 looks up a statement, and one question with distractors=0 leaves none")
    if questions * zero > questions * needed + each:
        raise ValueError(f"{questions} questions look up more statements than there are; ask for more distractors")
    return {**values, "questions": questions}


def guess(values: dict[str, Any], record: dict[str, Any]) -> list[float]:
    """The probability that a guess is right, for each question: of the digits that the program has, all equally likely;
    for a lookup, of the right-hand sides."""
    end = "\n" if values["style"] == "code" else ";"
    program = record["messages"][0]["content"].rpartition(end)[0]
    ends = {statement.partition("=")[2].strip() for statement in program.split(end)}
    digits = ends & {*DIGITS}
    return [1 / len(digits if n else ends) for n in record["hops"]]


def draw(values: dict[str, Any], draws: Draws, index: int) -> tuple[str, dict[str, Any]]:
    """(the program, record number `index`).

    A record with one question takes the values of `hops` in turn, so that groups have equal sizes; else hops are drawn.
    Every chain has at most one question. Lookups may ask for any statement. Raises UserError if no chains fit.
    """
    hops, count = values["hops"], values["questions"]
    total = draws.pick(values["statements"]) if values["statements"] else None
    for _ in range(TRIES):
        asked = [hops[index % len(hops)]] if count == 1 else [draws.pick(hops) for _ in range(count)]
        asked = [0 if draws.uniform() < values["lookups"] else n for n in asked]
        chains = _chains(values, draws, [n for n in asked if n], total)
        if chains and asked.count(0) <= sum(chains):
            break
    else:
        raise UserError(f"task:hops: {TRIES} draws gave no chains that fit; ask for fewer questions or hops")
    statements, ends = _program(values, draws, chains, len(asked) - asked.count(0))
    looked_up = draws.sample(statements, asked.count(0))
    problem = "".join(f"{name}={value};" for name, value in statements)
    found = [(n > 0, *(ends if n else looked_up).pop()) for n in asked]
    if values["style"] == "code":
        program = "".join(f"{name} = {value}\n" for name, value in statements)
        # Tokenizers join a space with the letter behind it, but not with a digit: each answer is whole tokens.
        answered = [
            (f"print({name}) # ", answer) if chain else (f"# {name} =", f" {answer}") for chain, name, answer in found
        ]
        answered = [answered[0], *((f"\n{question}", answer) for question, answer in answered[1:])]
    else:
        program = problem
        answered = [(f"{'?' if chain else '!'}{name}=", answer) for chain, name, answer in found]
    kinds = ["chain" if n else "lookup" for n in asked]
    return problem, {"messages": conversation(program, answered), "hops": asked, "kind": kinds}


def _chains(values: dict[str, Any], draws: Draws, asked: list[int], total: int | None) -> list[int]:
    """Statements of each chain: of those that are `asked` for, then of the others. [] if they do not fit.

    total: statements of the record, which chains of drawn sizes fill up; None: `distractors` sets their number.
    """
    sizes = _distractor_hops(values, asked)
    chains = list(asked)
    if total is None:
        chains += [draws.pick(sizes) for _ in range(draws.pick(values["distractors"]))]
        return chains if sum(chains) <= _count_names(values) else []
    if sum(asked) > total:
        return []
    while (left := total - sum(chains)) > 0:
        chains.append(min(draws.pick(sizes), left))
    return chains


def _distractor_hops(values: dict[str, Any], asked: Sequence[int]) -> Sequence[int]:
    """The sizes, equally likely, of a chain that is not asked for."""
    given = values["distractor_hops"]
    if given == SAME and asked:
        return asked
    return range(1, min(LONGEST, values["hops"][-1] or 4) + 1) if given in (None, SAME) else given


def _program(
    values: dict[str, Any], draws: Draws, chains: list[int], asked: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(statements, ends): pairs (name, value) in the order of the program, and (last name, digit) of `asked` chains.

    chains: statements of each chain; the first ones are asked for.   ends: in reverse order.
    """
    names = _names(values, draws, sum(chains))
    distinct = draws.sample(DIGITS, min(len(DIGITS), len(chains))) if values["digits"] == "distinct" else []
    made, ends = [], []
    for number, size in enumerate(chains):
        links, names = names[:size], names[size:]
        digit = distinct[number] if number < len(distinct) else draws.pick(DIGITS)
        made.append(list(zip(links, [digit, *links[:-1]], strict=True)))
        ends.append((links[-1], digit))
    return _ordered(values, draws, made, asked), ends[:asked][::-1]


def _refused(values: dict[str, Any]) -> set[str]:
    """Words that are no names."""
    return KEYWORDS if values["style"] == "code" else set()


def _count_names(values: dict[str, Any]) -> int:
    """The number of names of one length, the least of those that a record may draw."""
    letters, refused = {*values["names"]}, _refused(values)
    return min(
        len(letters) ** size - sum(len(word) == size and {*word} <= letters for word in refused)
        for size in values["name_length"]
    )


def _names(values: dict[str, Any], draws: Draws, count: int) -> list[str]:
    sizes = values["name_length"]
    size = sizes[0] if len(sizes) == 1 else draws.pick(sizes)
    if size == 1:
        return draws.sample(values["names"], count)
    refused = _refused(values)
    found: dict[str, None] = {}
    while len(found) < count:
        name = "".join(draws.pick(values["names"]) for _ in range(size))
        if name not in refused:
            found[name] = None
    return list(found)


def _ordered(
    values: dict[str, Any], draws: Draws, chains: list[list[tuple[str, str]]], asked: int
) -> list[tuple[str, str]]:
    """All statements of `chains`, by `order` and `place`."""
    orders, place = values["order"], values["place"]
    order = orders[0] if len(orders) == 1 else draws.pick(orders)
    parts = {"any": [chains], "first": [chains[:asked], chains[asked:]], "last": [chains[asked:], chains[:asked]]}
    found: list[tuple[str, str]] = []
    for part in parts[place]:
        if order == "shuffled":
            found += draws.shuffled([statement for chain in part for statement in chain])
        else:
            step = 1 if order == "forward" else -1
            found += [statement for chain in draws.shuffled(part) for statement in chain[::step]]
    return found
