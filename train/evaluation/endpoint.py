"""The answers of a running server, measured as `loopwise eval` measures a model's own."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from loopwise.errors import UserError, reason

from .answers import accuracy

if TYPE_CHECKING:
    from .answers import Answer, Sequences
    from .recipe import Evaluate

SECONDS = 600  # that one request may take


@dataclass
class Replies:
    """What came back for each answer. right: whether the text is the answer's.   depths: recurrences of its tokens on
    average, None where the server tells none.   tokens: of prompts and answers, summed.   seconds: for all requests."""

    right: list[bool]
    depths: list[float | None]
    tokens: int
    seconds: float


class Endpoint:
    """An OpenAI-compatible server at `url` (as http://127.0.0.1:8000/v1) that serves one model.

    Raises UserError where nobody answers there, or the `openai` package is missing.
    """

    def __init__(self, url: str):
        try:
            import openai
        except ImportError:
            raise UserError("endpoint: asking a server needs the openai package: pip install openai") from None
        self.url, self.errors = url, openai
        self._hint = "" if urlsplit(url).path.strip("/") else f"; its address mostly ends in /v1: {url.rstrip('/')}/v1"
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=SECONDS)
        self.name = self._call(self.client.models.list).data[0].id

    def ask(
        self, sequences: Sequences, tokenizer: Any, fields: dict[str, Any], at_once: int, report: Any = lambda: None
    ) -> Replies:
        """One greedy completion for every answer of `sequences`, given the true tokens before it, of as many tokens.

        `fields` stand in the body of every request. `report` is called after each reply.
        """
        with ThreadPoolExecutor(at_once) as pool:
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

    def _ask(
        self, sequences: Sequences, tokenizer: Any, fields: dict[str, Any], answer: Answer
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
            told = error.body.get("message") if isinstance(error.body, dict) else None
            hint = self._hint if error.status_code == 404 else ""
            raise UserError(f"endpoint={self.url}: HTTP {error.status_code}: {told or reason(error)}{hint}") from None
        except (self.errors.APIConnectionError, self.errors.APIResponseValidationError) as error:
            raise UserError(
                f"endpoint={self.url}: no OpenAI-compatible server answers there ({reason(error)}){self._hint}"
            ) from None


def evaluate(model: str, recipe: Evaluate, sequences: Sequences, tokenizer: Any) -> dict[str, Any]:
    """The answers of a server: as `evaluate`, without losses and `loop`; each result has "mean_recurrences" of the
    answers' tokens, of each group, too (None where the server tells none), and "tokens_per_second", prompts included.
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
                own = [d for a, d in zip(sequences.answers, replies.depths, strict=True) if a.group == name]
                group["mean_recurrences"] = _mean(own)
            result |= {"seconds": replies.seconds, "tokens_per_second": replies.tokens / replies.seconds}
            results.append(result)
    told = {
        "endpoint": recipe.endpoint,
        "served": server.name,
        "request": recipe.request,
        "data": recipe.data,
        "group": recipe.group,
    }
    counted = {"records": len(sequences.ids), "answers": len(sequences.answers)}
    return {"model": model, **told, **counted, "results": results}


def _mean(depths: list[float | None]) -> float | None:
    known = [depth for depth in depths if depth is not None]
    return sum(known) / len(known) if len(known) == len(depths) else None


def table(result: dict[str, Any]) -> str:
    """The result of `evaluate` for people."""
    groups = list(result["results"][0]["groups"])
    width = max(6, *map(len, groups)) if groups else 6
    names = " ".join(f"{name:>{width}}" for name in [*groups, "all"])
    by = f", by {result['group']}" if groups else ""
    lines = [
        f"{result['served']} at {result['endpoint']}, with the tokenizer of {result['model']}: "
        f"{result['answers']:,} answers",
        f"{'':>11}  right answers in %{by}, and the recurrences spent on a token",
        f"{'recurrences':>11}  {names}  {names}  {'tokens/s':>8}",
    ]
    for row in result["results"]:
        cells = [*(row["groups"][name] for name in groups), row]
        right = " ".join(f"{100 * cell['accuracy']:>{width}.1f}" for cell in cells)
        spent = [cell["mean_recurrences"] for cell in cells]
        depths = " ".join(f"{'-' if depth is None else f'{depth:.2f}':>{width}}" for depth in spent)
        lines.append(f"{row['num_recurrences'] or '-':>11}  {right}  {depths}  {row['tokens_per_second']:>8,.0f}")
    return "\n".join(lines)
