"""The answers of a running OpenAI-compatible server."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import UserError, reason
from .answers import Answer, Sequences
from .recipe import Evaluate
from .replies import Replies, measured

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 600  # timeout of one request


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
        try:
            self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=SECONDS)
        except Exception as error:  # of httpx, which openai does not wrap
            raise UserError(f"endpoint={url}: no address of a server ({reason(error)})") from None
        listed = self._call(self.client.models.list).data
        if not listed:
            raise UserError(f"endpoint={url}: this server lists no model")
        served = listed[0]
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


def evaluate(
    model: str,
    recipe: Evaluate,
    sequences: Sequences,
    tokenizer: PreTrainedTokenizerBase,
    trained: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The result of `replies.measured` for a server. Raises UserError for an error of the server."""
    server = Endpoint(recipe.endpoint or "")

    def ask(fields: dict[str, Any], report: Callable[[], object]) -> Replies:
        return server.ask(sequences, tokenizer, fields, recipe.batch_size, report)

    facts = {"endpoint": recipe.endpoint, "served": server.name}
    return measured(model, recipe, sequences, trained, facts, ask)
