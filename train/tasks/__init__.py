"""Generated tasks: data sources whose records are drawn, not stored. No torch here.

Files in reading order:

    parameters.py    parameters of a task, and reproducible draws
    hops.py          the task `hops`: chains of assignments
    words.py         named words, and questions about their values
    sums.py          the task `sums`: signed numbers
    parity.py        the task `parity`: bits
    s5.py            the task `s5`: permutations of five points
    registry.py      all tasks by name
    source.py        `task:NAME?...` as a data source, and its records
    vocabulary.py    the tokenizer of a task, and the chat template
"""

from .source import HELD_OUT, MESSAGES, TRAIN, Rows, Source, is_task, name_of, parse, placed
from .vocabulary import CHAT_TEMPLATE, tokenizer, tokenizer_with

__all__ = [
    "CHAT_TEMPLATE",
    "HELD_OUT",
    "MESSAGES",
    "TRAIN",
    "Rows",
    "Source",
    "is_task",
    "name_of",
    "parse",
    "placed",
    "tokenizer",
    "tokenizer_with",
]
