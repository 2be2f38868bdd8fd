"""A model, its data and a KV policy, measured at one depth or threshold after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ... import diagnosis
from ...errors import UserError
from ...serve.engine.admission import prompt_rules
from ...serve.engine.exits import RULES
from ...serve.params import Params
from ...trained import is_beyond
from .. import result
from ..answers import Sequences, accuracy
from .forced import Decoded, ForcedEngine, Span
from .readings import Recorder, Saved


@dataclass(frozen=True)
class Decoding:
    """Decoding of requests.

    num_recurrences: the full depth R.   min_recurrences: recurrences before a rule may fire.
    prompt_exit: rules end the prompt's positions, too.
    """

    num_recurrences: int
    min_recurrences: int
    kv_policy: str
    prompt_exit: bool = False

    @classmethod
    def of(cls, keys: Any, config: Any, num_recurrences: int) -> Decoding:
        """By the recipe `keys`, else by the model's `config`."""
        least = min((config.exit or {}).get("min_recurrences", 1), num_recurrences)
        policy = keys.kv_policy or config.kv_policy
        return cls(num_recurrences, keys.min_recurrences or least, policy, keys.prompt_exit)


def spans_of(sequences: Sequences) -> list[Span]:
    """One span for every run of learned tokens: what stands before it is its prompt. A text's prompt is its first
    token."""
    spans = []
    for number, (ids, learned) in enumerate(zip(sequences.ids, sequences.learned, strict=True)):
        edges = np.flatnonzero(np.diff(learned, prepend=False, append=False))
        for first, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if end > (start := max(first, 1)):
                spans.append(Span(ids[:end], start, number))
    return spans


@dataclass
class Bench:
    """Measures `sequences` by `engine`.

    Rows of results are {"mean_recurrences", "loss", "loss_error", "perplexity", "over_full", "over_full_error",
    "beyond_trained"}, and for conversations those of `accuracy`, with the "mean_recurrences" of each group.
    "over_full": the loss less that at full depth, with a standard error that is paired over sequences; None without
    `full`.   "beyond_trained": the mean depth is greater than any of training.
    """

    engine: ForcedEngine
    sequences: Sequences
    decoding: Decoding
    report: Callable[[], object] = lambda: None
    full: np.ndarray | None = None  # losses [n] of sequences at full depth
    spans: list[Span] = field(init=False)

    def __post_init__(self) -> None:
        self.spans = spans_of(self.sequences)
        count, of = len(self.sequences.ids), [span.sequence for span in self.spans]
        self.tokens = np.bincount(of, [span.answers for span in self.spans], count)

    @classmethod
    def open(cls, model: Any, sequences: Sequences, decoding: Decoding, batch_size: int) -> Bench:
        """A bench of the recurrent-depth model `model`, which is the engine's from then on.

        Raises UserError for a model or a KV policy that the engine does not run.
        """
        if model.config.router:
            raise UserError("a routed model's tokens have the depths of its router: it has no exit rules to measure")
        engine = ForcedEngine(
            model,
            max_num_seqs=batch_size,
            max_model_len=max(len(ids) for ids in sequences.ids),
            kv_policy=decoding.kv_policy,
            max_recurrences=decoding.num_recurrences,
            tell=lambda line: None,
        )
        return cls(engine, sequences, decoding)

    @property
    def rules(self) -> list[str]:
        """The exit rules that this model has, under this decoding."""
        config, policy = self.engine.config, self.engine.loop.state.policy
        may = prompt_rules(policy, config) if self.decoding.prompt_exit else tuple(RULES)
        return [name for name in may if name != "fixed" and (name != "gate" or config.exit_gate)]

    def check(self, rule: str) -> None:
        """Raises UserError for an exit rule that this model, its KV policy or this decoding exclude."""
        self.engine.request(self._params(rule, None))

    def fixed(self, depth: int) -> dict[str, Any]:
        """The row of requests with num_recurrences=`depth`. At full depth, sets `full`."""
        decoded = self.engine.decode(self.spans, Params(1, depth, exit_rule="fixed"), report=self.report)
        if depth == self.decoding.num_recurrences:
            self.full = self._by_sequence(decoded.losses)
        return {"num_recurrences": depth, **self._row(decoded)}

    def saved(self, rule: str) -> Saved:
        """The thresholds of `rule`, from what it reads at full depth.

        Raises UserError for a rule that the model lacks, and where no position may leave by a rule.
        """
        params = self._params(rule, None)
        recorder = Recorder(self.spans, self.decoding.num_recurrences)
        self.engine.decode(self.spans, params, watch=recorder, report=self.report)
        found = Saved.of(rule, recorder.values, self.decoding.min_recurrences)
        if not len(found.extremes):
            raise UserError(self._nothing_leaves())
        return found

    def at(self, rule: str, threshold: float) -> dict[str, Any]:
        """The row of requests with this exit rule and threshold."""
        decoded = self.engine.decode(self.spans, self._params(rule, threshold), report=self.report)
        return {"threshold": threshold, **self._row(decoded)}

    def _params(self, rule: str, threshold: float | None) -> Params:
        of = self.decoding
        return Params(
            1, of.num_recurrences, of.min_recurrences, rule, exit_threshold=threshold, prompt_exit=of.prompt_exit
        )

    def _nothing_leaves(self) -> str:
        top, least = self.decoding.num_recurrences, self.decoding.min_recurrences
        if least >= top:
            return f"num_recurrences={top}, min_recurrences={least}: a rule has no recurrence to save"
        return (
            "no position may leave by a rule: answers of one token come of the prompt's last position; set "
            "prompt_exit=true, with kv_policy=last-exited"
        )

    def _by_sequence(self, values: np.ndarray) -> np.ndarray:
        """Sums [n] over the spans of each sequence, of values for each span."""
        return np.bincount([span.sequence for span in self.spans], values, len(self.sequences.ids))

    def _row(self, decoded: Decoded) -> dict[str, Any]:
        losses = self._by_sequence(decoded.losses)
        spent = [sum(depths[span.start - 1 :]) for span, depths in zip(self.spans, decoded.depths, strict=True)]
        row: dict[str, Any] = {"mean_recurrences": float(sum(spent) / self.tokens.sum())}
        row["beyond_trained"] = is_beyond(self.engine.config.trained_recurrences, row["mean_recurrences"])
        row |= result.loss(losses, self.tokens)
        if self.full is not None:
            over = losses - self.full
            row["over_full"] = float(over.sum() / self.tokens.sum())
            row["over_full_error"] = diagnosis.standard_error(over, self.tokens)
        if self.sequences.answers:
            last = {(span.sequence, len(span.ids) - 1): i for i, span in enumerate(self.spans)}
            places = [last[answer.sequence, answer.last] for answer in self.sequences.answers]
            row |= accuracy(self.sequences, decoded.right[places].tolist())
            for name, group in row["groups"].items():
                mine = [i for i, answer in zip(places, self.sequences.answers, strict=True) if answer.group == name]
                tokens = sum(self.spans[i].answers for i in mine)
                group["mean_recurrences"] = sum(spent[i] for i in mine) / tokens
        return row
