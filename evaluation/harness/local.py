"""Local tasks: a .jsonl of questions and answers, or a short .yaml about one, as a task of lm-eval.

The short form has `data`, `metric`, `choices` and `fewshot`; any key of lm-eval's task files may stand beside them. No
part of it needs a network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from lm_eval.config.task import TaskConfig

from ...errors import UserError, nearest
from ...recipe import read_recipe

METRICS = ("exact_match", "acc")
SHORT = ("data", "metric", "choices", "fewshot")  # keys of the short form beside lm-eval's
LOADERS = ("json", "csv", "parquet", "text", "arrow")  # of `datasets`, for files
# An answer is one line. lm-eval strips white space at both ends before it compares.
GENERATION: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 64, "do_sample": False},
    "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
}
LIKELIHOOD: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}


def is_short(values: dict[str, Any]) -> bool:
    """True if a task file with these keys has the short form."""
    return "data" in values


def read_short(file: Path) -> dict[str, Any]:
    """The lm-eval config of the .jsonl `file`, or of the .yaml `file` in the short form.

    Its `custom_dataset` gives the records. Raises UserError for a wrong key, or a wrong line of a .jsonl (file:line).
    """
    values = {"data": file.name} if file.suffix == ".jsonl" else read_recipe("task", str(file))
    known = {field.name for field in fields(TaskConfig)} | set(SHORT)
    if wrong := next((key for key in values if key not in known), None):
        near = nearest(str(wrong), sorted(known))
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"{file}: unknown key {wrong!r}: {hint}keys are {', '.join(SHORT)}, and those of lm-eval")
    choices = values.get("choices")
    if choices is not None and (not isinstance(choices, list) or len(choices) < 2):
        raise UserError(f"{file}: choices={choices!r}: a list of two or more answers, the same for all questions")
    if any(isinstance(choice, bool) for choice in choices or ()):
        raise UserError(f"{file}: choices={choices!r}: YAML reads yes and no as true and false; write them in quotes")
    records = list(_lines(_beside(file, values["data"], "data")))
    metric = values.get("metric") or ("acc" if choices or "choices" in records[0][1] else "exact_match")
    if metric not in METRICS:
        raise UserError(f"{file}: metric={metric}: choose from {', '.join(METRICS)}, or write a full task of lm-eval")
    if choices and metric != "acc":
        raise UserError(f"{file}: choices have no effect on metric={metric}; metric: acc compares them")
    splits = {"test": [_document(where, record, metric, choices) for where, record in records]}
    if "fewshot" in values:
        shots = _lines(_beside(file, values["fewshot"], "fewshot"))
        splits["fewshot"] = [_document(where, record, metric, choices) for where, record in shots]
    config = {
        "task": file.stem,
        "doc_to_text": "question",
        "test_split": "test",
        # lm-eval's sampler draws from the questions themselves, and leaves out the one that is asked.
        "fewshot_split": "fewshot" if "fewshot" in values else "test",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        **(LIKELIHOOD if metric == "acc" else GENERATION),
        **{key: value for key, value in values.items() if key not in SHORT},
    }
    settings = values.get("generation_kwargs", {})
    if not isinstance(settings, dict):
        raise UserError(f"{file}: generation_kwargs={settings!r}: a mapping of settings to values")
    if "generation_kwargs" in config:
        config["generation_kwargs"] = {**GENERATION["generation_kwargs"], **settings}
    return {**config, "custom_dataset": _Records(splits)}


class _Records:
    """Gives lm-eval the documents, as splits of `datasets`."""

    def __init__(self, splits: dict[str, list[dict[str, Any]]]):
        self.splits = splits

    def __call__(self, **_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {name: Dataset.from_list(documents) for name, documents in self.splits.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Records:
        return self  # lm-eval copies configs; documents are only read

    def __repr__(self) -> str:  # lm-eval keeps it in the config that it reports
        return f"{sum(map(len, self.splits.values()))} records"


def located(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The full lm-eval config `config` of `file`, with paths of data files relative to `file`."""
    given = (config.get("dataset_kwargs") or {}).get("data_files")
    if config.get("dataset_path") not in LOADERS or given is None:
        return config

    def absolute(name: Any) -> Any:
        if isinstance(name, dict):
            return {split: absolute(one) for split, one in name.items()}
        if isinstance(name, list):
            return [absolute(one) for one in name]
        path = Path(str(name)).expanduser()
        if "://" in str(name) or path.is_absolute():
            return name
        return str(file.parent.resolve() / path)

    return {**config, "dataset_kwargs": {**config["dataset_kwargs"], "data_files": absolute(given)}}


def _beside(file: Path, name: Any, key: str) -> Path:
    """The path `name` that stands under `key` in `file`. Raises UserError unless it is a .jsonl that exists."""
    if not isinstance(name, str) or not name.endswith(".jsonl"):
        raise UserError(f"{file}: {key}={name!r}: the path of a .jsonl file, relative to this one")
    path = file.parent / Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"{file}: {key}={name}: no such file")
    return path


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, record) of each line that is not blank. Raises UserError for a line that is no JSON object."""
    found = False
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where, found = f"{file}:{number}", True
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not JSON ({error})") from None
                if not isinstance(record, dict):
                    raise UserError(
                        f"{where}: a {type(record).__name__}, where an object with question and answer is due"
                    )
                yield where, record
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None
    if not found:
        raise UserError(f"{file}: no questions in it")


def _document(where: str, record: dict[str, Any], metric: str, choices: list[Any] | None) -> dict[str, Any]:
    """`record` as lm-eval's document: with an answer of text, or for `acc` its number among `choices`."""
    for key in ("question", "answer"):
        if key not in record:
            raise UserError(f"{where}: no field {key!r} among {', '.join(map(repr, record)) or 'none'}")
        if not isinstance(record[key], str | int | float) or isinstance(record[key], bool):
            raise UserError(f"{where}: {key}={json.dumps(record[key])}: a text or a number")
    document = {**record, "question": str(record["question"]), "answer": str(record["answer"])}
    if metric != "acc":
        return document
    given = choices or record.get("choices")
    if not isinstance(given, list) or len(given) < 2:
        raise UserError(f"{where}: metric acc needs choices, a list of two or more, here or in the task's .yaml")
    named = [str(choice) for choice in given]
    answer, place = document["answer"], record["answer"]
    if answer in named:
        return {**document, "choices": named, "answer": named.index(answer)}
    if isinstance(place, int) and 0 <= place < len(named):  # the place of the answer, counted from 0
        return {**document, "choices": named, "answer": place}
    raise UserError(f"{where}: answer={json.dumps(place)}: none of the choices {', '.join(map(repr, named))}")
