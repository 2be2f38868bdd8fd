"""Questions whose right answers are a model's own at some depth, so that its scores differ by depth."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from loopwise.train.pretrained import load_model
from loopwise.train.tasks import tokenizer
from tests.helpers.train_tiny import save_recurrent

DEPTHS = (1, 2, 4)
LETTERS = "abcdefghijklmnop"
TOKENS = 5  # of an answer

GENERATED = """
task: generated
dataset_path: json
dataset_kwargs: {data_files: {test: generated.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "c"], max_gen_toks: 5, do_sample: false}
filter_list: [{name: none, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
task: chosen
dataset_path: json
dataset_kwargs: {data_files: {test: chosen.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recurrent-depth model `model` and two tasks of 24 questions about it."""
    trained = {"min": 1, "max": 2, "mean": 1.5}
    return save_asked(tmp_path_factory.mktemp("asked"), 24, trained_recurrences=trained)


def save_asked(folder: Path, count: int, **changes: Any) -> Path:
    """Save a recurrent-depth model that can be exported and served as `folder`/model, and `count` questions about it.

    changes: of the model's config.
    """
    known = tokenizer("hops")  # ASCII: servers leave out the bytes of a character that a text breaks off in
    source = {"vocab_size": len(known), "eos_token_id": known.eos_token_id, "initializer_range": 0.3}
    source |= {"hidden_size": 64, "intermediate_size": 96}  # vLLM's CPU attention has no heads of 16
    save_recurrent(folder / "model", known, source, injection="none", **changes)
    write_questions(folder, load_model(str(folder / "model")).eval(), known, count)
    return folder


def write_questions(folder: Path, model: Any, known: Any, count: int) -> None:
    """Write generated.jsonl, chosen.jsonl, and a task file of lm-eval for each.

    The answer to three of four questions is that of `model` at one of DEPTHS, found by calls of the model alone; that
    to the fourth is drawn. Answers end before a c, which the task stops at.
    """
    draw = random.Random(0)
    generated, chosen = [], []
    for number in range(count):
        question = "".join(draw.choices(LETTERS, k=draw.randint(3, 12)))
        choices = ["".join(draw.choices(LETTERS, k=draw.randint(1, 4))) for _ in range(4)]
        depth = DEPTHS[number % 3] if number % 4 != 3 else None
        answer = "none" if depth is None else greedy(model, known, question, depth)
        best = draw.randrange(4) if depth is None else likeliest(model, known, question, choices, depth)
        generated.append({"question": question, "answer": answer.replace("\n", "c").partition("c")[0].strip()})
        chosen.append({"question": question, "choices": choices, "answer": best})
    for name, records, task in (("generated", generated, GENERATED), ("chosen", chosen, CHOSEN)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / f"{name}.yaml").write_text(task)


@torch.no_grad()
def greedy(model: Any, known: Any, question: str, depth: int) -> str:
    """The likeliest TOKENS tokens after `question`, one by one and without a cache, up to the end of text."""
    ids, made = known(question).input_ids, []
    while len(made) < TOKENS:
        logits = model(torch.tensor([ids + made]), num_recurrences=depth, use_cache=False).logits[0, -1]
        made.append(int(logits.argmax()))
        if made[-1] == known.eos_token_id:
            break
    return known.decode(made, skip_special_tokens=True)


@torch.no_grad()
def likeliest(model: Any, known: Any, question: str, choices: list[str], depth: int) -> int:
    """The number of the choice of the greatest log-probability after `question`."""
    found = []
    for choice in choices:
        ids, start = known(question + choice).input_ids, len(known(question).input_ids)
        logits = model(torch.tensor([ids]), num_recurrences=depth, use_cache=False).logits[0].log_softmax(-1)
        found.append(sum(float(logits[n - 1, ids[n]]) for n in range(start, len(ids))))
    return max(range(len(choices)), key=found.__getitem__)
