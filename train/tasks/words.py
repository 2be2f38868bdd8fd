"""Named words, and questions about their values: `a=+3-5;b=-2+4+6;?b=`.

A word is a row of elements, and its value the product of them in some group: a sum, a parity, a permutation. The value
has the form of an element, so that one step of the computation can follow another. The length of the word is the
difficulty: n elements need n - 1 steps, one after the other or in a tree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .parameters import Draws, Parameter, choice, conversation, either, integer, letters, numbers

SAME = "same"
LAST, RUNNING = "last", "running"

Values = dict[str, Any]


@dataclass(frozen=True)
class Words:
    """The records of one task.

    element: draws an element, as text.   products: the value of each beginning of a word, as text; the last one is the
    word's.   own: parameters of this task.   separator: text between elements.   forms: number of values, where all are
    equally likely.
    """

    element: Callable[[Values, Draws], str]
    products: Callable[[Values, list[str]], list[str]]
    own: dict[str, Parameter]
    separator: str = ""
    forms: int | None = None

    @property
    def parameters(self) -> dict[str, Parameter]:
        """All parameters by name."""
        return {
            "length": Parameter(
                numbers(1, 64), tuple(range(1, 9)), "elements of a word that is asked for, equally likely: 4, 1..8"
            ),
            **self.own,
            "answer": Parameter(
                choice(LAST, RUNNING),
                LAST,
                f"{LAST}: the value of the word; {RUNNING}: the value of each of its beginnings, one step apart",
            ),
            "questions": Parameter(integer(1, 20), 1, "questions of a record, each about another word"),
            "distractors": Parameter(numbers(0, 25), (0,), "words that are not asked for"),
            "distractor_length": Parameter(
                either(SAME, numbers(1, 64)),
                None,
                f"elements of such a word, or {SAME}: as many as a word that is asked for (default: as length)",
            ),
            "names": Parameter(letters, letters("a..z"), "letters that name the words: a..z, a..m+x"),
            "place": Parameter(
                choice("any", "first", "last"), "any", "where the words that are asked for stand in the record"
            ),
        }

    def settle(self, values: Values) -> Values:
        """`values` unchanged. Raises ValueError for more words than names, and for values without effect."""
        if values["distractors"][-1] == 0:
            if values["distractor_length"] is not None:
                raise ValueError("distractor_length has no effect: distractors is 0; give distractors=N, too")
            if values["place"] != "any":
                raise ValueError("place has no effect: distractors is 0, so that all words are asked for")
        count, names = values["questions"] + values["distractors"][-1], len(values["names"])
        if count > names:
            raise ValueError(
                f"{count} words need as many names, and there are {names}; ask for fewer questions or distractors, or "
                "give more letters"
            )
        return values

    def draw(self, values: Values, draws: Draws, index: int) -> tuple[str, dict[str, Any]]:
        """(the program, record number `index`).

        A record with one question takes the values of `length` in turn, so that groups have equal sizes; else lengths
        are drawn.
        """
        lengths, count = values["length"], values["questions"]
        asked = [lengths[index % len(lengths)]] if count == 1 else [draws.pick(lengths) for _ in range(count)]
        others = {None: lengths, SAME: asked}.get(values["distractor_length"], values["distractor_length"])
        sizes = [*asked, *(draws.pick(others) for _ in range(draws.pick(values["distractors"])))]
        words = [[self.element(values, draws) for _ in range(size)] for size in sizes]
        named = list(zip(draws.sample(values["names"], len(words)), words, strict=True))
        parts = {"any": [named], "first": [named[:count], named[count:]], "last": [named[count:], named[:count]]}
        order = [word for part in parts[values["place"]] for word in draws.shuffled(part)]
        program = "".join(f"{name}={self.separator.join(word)};" for name, word in order)
        answered = [(f"?{name}=", self._answer(values, word)) for name, word in named[:count]]
        return program, {"messages": conversation(program, answered), "length": asked}

    def guess(self, values: Values, record: dict[str, Any]) -> list[float]:
        """The probability that a guess among all `forms` is right, for each question."""
        running = values["answer"] == RUNNING
        return [(self.forms or 1) ** -(length if running else 1) for length in record["length"]]

    def _answer(self, values: Values, word: list[str]) -> str:
        products = self.products(values, word)
        return self.separator.join(products) if values["answer"] == RUNNING else products[-1]
