"""The value of a program: loss of text, right answers, or scores of lm-eval's tasks.

A bench has n samples: sequences, or questions. `values` [n] are higher for better programs, and `weights` [n] are the
tokens or questions that a sample stands for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ...errors import UserError
from ..answers import Sequences
from ..depths import measure
from ..recipe import Evaluate
from ..result import standard_error
from .model import ProgramModel
from .program import Program


class Bench(Protocol):
    """The values of programs on some data, as a search needs them.

    metric: its name.   higher: True where a higher value is better.   weights [n].
    """

    metric: str
    higher: bool
    weights: np.ndarray

    def values(self, program: Program, samples: Sequence[int] | None = None) -> np.ndarray:
        """Sums [n] of the metric over each sample, or of the `samples` alone."""
        ...

    def fingerprint(self) -> str:
        """A hash of the samples."""
        ...


def mean(values: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """{"value", "value_error"} from sums [n] over samples with `weights` [n]."""
    return {"value": float(values.sum() / weights.sum()), "value_error": standard_error(values, weights)}


class TextBench:
    """Loss a token on `sequences`, in nats; with `answers`, the share of right ones.

    batch_tokens: most tokens in a batch.
    """

    def __init__(self, model: ProgramModel, sequences: Sequences, batch_tokens: int):
        self.model, self.sequences, self.batch_tokens = model, sequences, batch_tokens
        self.higher = bool(sequences.answers)
        self.metric = "accuracy" if self.higher else "loss"
        counts = [int(learned[1:].sum()) for learned in sequences.learned]
        if self.higher:
            counts = np.bincount([a.sequence for a in sequences.answers], minlength=len(sequences.ids)).tolist()
        self.weights = np.array(counts, float)

    def values(self, program: Program, samples: Sequence[int] | None = None) -> np.ndarray:
        self.model.run_program(program)
        chosen = self.sequences if samples is None else self.sequences.some(samples)
        found = measure(self.model, chosen, None, self.batch_tokens)
        if not self.higher:
            return found.losses[None]
        right = [float(one) for one in found.right[None]]
        return np.bincount([a.sequence for a in chosen.answers], right, len(chosen.ids))

    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(self.samples())).hexdigest()[:16]

    def samples(self) -> list[bytes]:
        """A hash of each sample."""
        each = zip(self.sequences.ids, self.sequences.learned, strict=True)
        return [hashlib.sha256(np.array(sample, np.int64).tobytes()).digest() for sample in each]


class TaskBench:
    """Scores of lm-eval's tasks: the first metric of each, as the task computes it for one question."""

    metric, higher = "score", True

    def __init__(self, model: ProgramModel, recipe: Evaluate, tokenizer: Any, trust: bool = False):
        from ..harness.catalogue import load_tasks
        from ..harness.models import LoopwiseLM
        from ..harness.prepare import check_generation, configure

        self.model = model
        self.lm = LoopwiseLM(pretrained=model, tokenizer=tokenizer, batch_size=recipe.batch_size)
        self.questions: list[tuple[Any, list[Any]]] = []  # (task, its requests about one document)
        self.found = load_tasks(recipe.tasks, trust)
        for name, task in self.found.tasks.items():
            with self.found.faults(name):
                configure(task, recipe)
                check_generation(task, self.lm)
                task.set_fewshot_seed(seed=1234)
                task.build_all_requests(
                    limit=recipe.limit,
                    rank=0,
                    world_size=1,
                    system_instruction=recipe.system_instruction,
                    apply_chat_template=recipe.apply_chat_template,
                    fewshot_as_multiturn=True,
                    chat_template=self.lm.apply_chat_template if recipe.apply_chat_template else None,
                    tokenizer_name=getattr(self.lm, "tokenizer_name", "") if recipe.apply_chat_template else "",
                )
            by_document: dict[int, list[Any]] = {}
            for request in task.instances:
                by_document.setdefault(request.doc_id, []).append(request)
            self.questions += [(task, requests) for requests in by_document.values()]
        self.weights = np.ones(len(self.questions))

    def values(self, program: Program, samples: Sequence[int] | None = None) -> np.ndarray:
        self.model.run_program(program)
        chosen = [self.questions[i] for i in (range(len(self.questions)) if samples is None else samples)]
        kinds: dict[str, list[Any]] = {}
        for _, requests in chosen:
            for request in requests:
                request.resps, request.filtered_resps = [], {}
                kinds.setdefault(request.request_type, []).append(request)
        for kind, requests in kinds.items():
            for request, found in zip(requests, getattr(self.lm, kind)(requests, disable_tqdm=True), strict=True):
                request.resps.append(found)
        return np.array([self._score(task, requests) for task, requests in chosen])

    def fingerprint(self) -> str:
        from ..harness.catalogue import fingerprint

        found = []
        for name, task in self.found.tasks.items():
            with self.found.faults(name):
                found.append(fingerprint(task))
        return " ".join(found)

    def _score(self, task: Any, requests: list[Any]) -> float:
        """The first metric of one question. Raises UserError for one that is no number, or that falls as models get
        better."""
        all_requests, task._instances = task._instances, requests
        with self.found.faults(task.task_name):
            try:
                task.apply_filters()
            finally:
                task._instances = all_requests
            key = next(iter(requests[0].filtered_resps))
            metrics = task.process_results(requests[0].doc, [request.filtered_resps[key] for request in requests])
            name, value = next(iter(metrics.items()))
            if isinstance(value, tuple | list) or not task.higher_is_better().get(name, True):
                raise UserError(
                    f"task {task.task_name}: {name} is no score of one question that rises with better answers"
                )
            return float(value)
