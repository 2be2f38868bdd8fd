"""The answers of a running OpenAI-compatible server."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import UserError, reason
from .answers import Answer, Sequences, accuracy
from .recipe import Evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 600  # timeout of one request


@dataclass
class Replies:
    """The replies to all requests.

    right: True for each reply that equals its answer.   depths: mean recurrences per token of each, None if the server
    reports none.   tokens: sum over prompts and replies.   seconds: time of all requests together.
    """

    right: list[bool]
    depths: list[float | None]
    tokens: int
    seconds: float


class Endpoint:
    """An OpenAI-compatible server at `url` (as http://127.0.0.1:8000/v1) that serves one model.

    name: the model's, as the server calls it.   positions: most of a request; None if the server reports none.

    Raises UserError if no server answers there, or if the `openai` package is missing.
    """

    def __init__(self, url: str):
        try:
            import openai
        except ImportError:
            raise UserError("endpoint: requests to a server need the openai package: pip install openai") from None
        self.url, self.errors = url, openai
        self._hint = "" if urlsplit(url).path.strip("/") else f"; its address usually ends in /v1: {url.rstrip('/')}/v1"
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=SECONDS)
        served = self._call(self.client.models.list).data[0]
        self.name = served.id
        self.positions: int | None = (served.model_extra or {}).get("max_model_len")

    def ask(
        self,
        sequences: Sequences,
        tokenizer: PreTrainedTokenizerBase,
        fields: dict[str, Any],
        concurrency: int,
        report: Callable[[], object] = lambda: None,
    ) -> Replies:
        """One greedy completion for every answer of `sequences`, of its length, after the true tokens before it.

        fields: added to the body of every request.   concurrency: requests at once.   report: called after each reply.
        Raises UserError for an error of the server.
        """
        with ThreadPoolExecutor(concurrency) as pool:
            start = time.monotonic()
            replies = [pool.submit(self._ask, sequences, tokenizer, fields, answer) for answer in sequences.answers]
            try:
                found = []
                for reply in replies:
                    found.append(reply.result())
                    report()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            seconds = time.monotonic() - start
        return Replies([f[0] for f in found], [f[1] for f in found], sum(f[2] for f in found), seconds)

    def try_fields(self, prompt: list[int], fields: dict[str, Any]) -> None:
        """Ask for one token after `prompt` with `fields` in the body. Raises UserError if they are refused."""
        self._call(
            self.client.completions.create,
            model=self.name,
            prompt=prompt,
            max_tokens=1,
            temperature=0,
            extra_body=fields,
        )

    def _ask(
        self, sequences: Sequences, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], answer: Answer
    ) -> tuple[bool, float | None, int]:
        ids = sequences.ids[answer.sequence].tolist()
        wanted = ids[answer.first : answer.last + 1]
        reply = self._call(
            self.client.completions.create,
            model=self.name,
            prompt=ids[: answer.first],
            max_tokens=len(wanted),
            temperature=0,
            extra_body=fields,
        )
        spent = (reply.usage.model_extra or {}).get("recurrences")
        text = tokenizer.decode(wanted, skip_special_tokens=True)
        return reply.choices[0].text == text, spent and spent["mean"], reply.usage.total_tokens

    def _call(self, function: Any, **arguments: Any) -> Any:
        try:
            return function(**arguments)
        except self.errors.APIStatusError as error:
            message = error.body.get("message") if isinstance(error.body, dict) else None
            hint = self._hint if error.status_code == 404 else ""
            raise UserError(
                f"endpoint={self.url}: HTTP {error.status_code}: {message or reason(error)}{hint}"
            ) from None
        except (self.errors.APIConnectionError, self.errors.APIResponseValidationError) as error:
            raise UserError(
                f"endpoint={self.url}: no OpenAI-compatible server answers there ({reason(error)}){self._hint}"
            ) from None


def evaluate(model: str, recipe: Evaluate, sequences: Sequences, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The result of `loopwise eval` for the answers of a server: without losses and "loop".

    Each result and each group has "mean_recurrences" per token of its answers (None if the server reports none). Each
    result has "seconds" and "tokens_per_second", with prompts. Raises UserError for an error of the server.
    """
    from tqdm import tqdm

    server = Endpoint(recipe.endpoint or "")
    depths = recipe.num_recurrences or [None]
    results = []
    count = len(depths) * len(sequences.answers)
    with tqdm(total=count, desc="eval", unit="answer", disable=not sys.stderr.isatty()) as bar:
        for depth in depths:
            fields = {**recipe.request, **({"num_recurrences": depth} if depth else {})}
            replies = server.ask(sequences, tokenizer, fields, recipe.batch_size, bar.update)
            result = {"num_recurrences": depth, **accuracy(sequences, replies.right)}
            result["mean_recurrences"] = _mean(replies.depths)
            for name, group in result["groups"].items():
                members = [d for a, d in zip(sequences.answers, replies.depths, strict=True) if a.group == name]
                group["mean_recurrences"] = _mean(members)
            result |= {"seconds": replies.seconds, "tokens_per_second": replies.tokens / replies.seconds}
            results.append(result)
    facts = {
        "endpoint": recipe.endpoint,
        "served": server.name,
        "request": recipe.request,
        "data": recipe.data,
        "group": recipe.group,
    }
    counted = {"records": len(sequences.ids), "answers": len(sequences.answers)}
    return {"model": model, **facts, **counted, "results": results}


def _mean(depths: list[float | None]) -> float | None:
    known = [depth for depth in depths if depth is not None]
    return sum(known) / len(known) if len(known) == len(depths) else None
