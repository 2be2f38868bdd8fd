"""`loopwise-served`: lm-eval's client of a running server, with the depth in every request."""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models import openai_completions

from .templates import ChatTemplates
from .work import Work

TRIES = 3  # of a request, before the measurement ends


LocalCompletionsAPI: Any = openai_completions.LocalCompletionsAPI  # its decorator hides its type


class ServedLM(ChatTemplates, LocalCompletionsAPI):
    """A model behind `base_url` (as http://127.0.0.1:8000/v1/completions).

    num_recurrences: R of every request; None for the server's own. It may be changed between calls.   request: more
    fields of every request, as {"exit_rule": "cosine"}. Other arguments are those of lm-eval's local-completions.
    `work` counts what the replies report.
    """

    def __init__(self, num_recurrences: int | None = None, request: dict[str, Any] | None = None, **arguments: Any):
        super().__init__(**{"tokenizer_backend": "huggingface", "max_retries": TRIES, **arguments})
        self.num_recurrences, self.fields = num_recurrences, dict(request or {})
        self.work = Work()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        with self.work.timed():
            return super().generate_until(requests, disable_tqdm)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self.work.timed():
            return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        with self.work.timed():
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def _create_payload(self, *arguments: Any, **settings: Any) -> dict[str, Any]:
        depth = {} if self.num_recurrences is None else {"num_recurrences": self.num_recurrences}
        return {**super()._create_payload(*arguments, **settings), **self.fields, **depth}

    def parse_generations(self, outputs: Any, **facts: Any) -> list[str]:
        self._count(outputs)
        return super().parse_generations(outputs, **facts)

    def parse_logprobs(self, outputs: Any, **facts: Any) -> Any:
        self._count(outputs)
        return super().parse_logprobs(outputs, **facts)

    def _count(self, outputs: Any) -> None:
        """Add the usage of a reply, or of several, to `work`."""
        for reply in outputs if isinstance(outputs, list) else [outputs]:
            usage = reply.get("usage") or {}
            depths, made = usage.get("recurrences") or {}, usage.get("completion_tokens") or 0
            self.work.add(usage.get("total_tokens") or 0, depths.get("mean"), made)
            if self.fields and usage.get("passes"):
                # `items` begin after each answer's first token, whose recurrences are the prompt's: the mean stands in.
                first = len(reply["choices"]) * depths.get("mean", 0)
                self.work.computed = (self.work.computed or 0) + usage["passes"]["items"] + first


register_model("loopwise-served")(ServedLM)
