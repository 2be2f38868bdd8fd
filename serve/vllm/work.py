"""The recurrences of one HTTP request, from vLLM's outputs to the usage of its reply and to the chunks of a stream.

A token's work is a row [3] of integers: its recurrences, and the passes and items of its request so far
(`output.LaneOutput`). Rows travel in vLLM's field `routed_experts`, which vLLM fills in the last output of a choice.
`note_tokens` fills it in every output of a request that asks for `return_recurrences`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple


class Tokens(NamedTuple):
    """All tokens of a choice so far, in lists that grow with it: to copy them at every token would take a time that is
    quadratic in the reply.

    work: a row [3] a token; None in the fixed engine.   texts: the text that each token adds; vLLM decodes no text for
    a stop token, so the list may end before it.
    """

    work: list[list[int]] | None
    texts: list[str]


class Work:
    """The recurrences and passes of one HTTP request: those of every choice, once it has finished.

    fixed: the depth of all tokens in the fixed engine; None in the lane engine.   per_token: list depths in the usage.
    in_chunks: list them in the chunks of a stream, too.   remove_ids: token ids are in these chunks for us alone.
    """

    def __init__(self, fixed: int | None, per_token: bool, in_chunks: bool = False, remove_ids: bool = False):
        self.fixed, self.per_token, self.in_chunks, self.remove_ids = fixed, per_token, in_chunks, remove_ids
        self.choices: list[dict[int, list[list[int]]]] = []  # by prompt, then by choice: its work
        self.waiting: dict[int, list[tuple[int, str]]] = {}  # by choice of the reply: depths and texts not yet sent

    def follow(self, stream: AsyncGenerator, count: int) -> AsyncGenerator:
        """The `stream` of vLLM's RequestOutputs of one prompt with `count` choices. Moves `routed_experts` out of them,
        into `choices` and `waiting`."""
        first = len(self.choices) * count  # vLLM numbers the choices of all prompts in one row
        work: dict[int, list[list[int]]] = {}
        self.choices.append(work)
        sent: dict[int, int] = {}

        async def noted():
            async with aclosing(stream):
                async for output in stream:
                    for choice in output.outputs:
                        noticed, choice.routed_experts = choice.routed_experts, None
                        if isinstance(noticed, Tokens) and self.in_chunks:
                            start = sent.get(choice.index, 0)
                            sent[choice.index] = start + len(choice.token_ids)
                            self._wait(first + choice.index, noticed, start, sent[choice.index])
                        rows = noticed.work if isinstance(noticed, Tokens) else noticed
                        if choice.finish_reason is not None and rows is not None:
                            work[choice.index] = rows if isinstance(rows, list) else rows.tolist()
                    yield output

        return noted()

    def _wait(self, index: int, tokens: Tokens, start: int, end: int) -> None:
        """Put tokens `start` to `end` of choice `index` into `waiting`."""
        work = tokens.work
        depths = [self.fixed or 0] * (end - start) if work is None else [row[0] for row in work[start:end]]
        texts = tokens.texts[start:end]
        texts += [""] * (len(depths) - len(texts))
        self.waiting.setdefault(index, []).extend(zip(depths, texts, strict=True))

    def add_to_chunk(self, reply: dict[str, Any]) -> None:
        """Add `recurrences` and `tokens` to each choice of a chunk of a stream, one entry for each of its token ids.

        Of tokens that vLLM hides (of its reasoning), it sends no ids, and so nothing is added.
        """
        for choice in reply.get("choices", ()):
            count = len(choice.get("token_ids") or ())
            waiting = self.waiting.get(choice["index"], [])
            choice["recurrences"] = [depth for depth, _ in waiting[:count]]
            choice["tokens"] = [text for _, text in waiting[:count]]
            del waiting[:count]
            if self.remove_ids:
                for place in (choice, reply):
                    place.update(dict.fromkeys({"token_ids", "prompt_token_ids"} & place.keys()))

    def usage(self, tokens: int) -> dict[str, Any] | None:
        """Additional usage of a reply of `tokens` tokens; None while it is unknown.

        recurrences: mean, total, and with `per_token` a list for each choice.
        passes: of the core after the prompt. `sequential`: one after the other. `per_token`: their mean for a token.
        `wave`: the mean of positions in flight. `items`: positions in all passes. `wasted`: those that gave no token.
        """
        if self.fixed is not None:
            return {"recurrences": {"mean": float(self.fixed), "total": self.fixed * tokens}}
        lists = [choice[index] for choice in self.choices for index in sorted(choice)]
        depths = [work[0] for one in lists for work in one]
        if not depths:
            return None
        usage: dict[str, Any] = {"mean": sum(depths) / len(depths), "total": sum(depths)}
        if self.per_token:
            usage["per_token"] = [[work[0] for work in one] for one in lists]
        sequential, items = (sum(one[-1][n] for one in lists if one) for n in (1, 2))
        later = sum(work[0] for one in lists for work in one[1:])  # the first token comes from the prompt's pass
        passes = {
            "sequential": sequential,
            "per_token": sequential / max(len(depths) - len(lists), 1),
            "wave": items / max(sequential, 1),
            "items": items,
            "wasted": max(items - later, 0),
        }
        return {"recurrences": usage, "passes": passes}


def note_tokens() -> None:
    """Wrap vLLM's detokenizer and outputs in this process: requests with `return_recurrences` get `Tokens` in every
    output. vLLM joins outputs that wait for a slow client, and keeps the later one's field, which has all tokens."""
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer
    from vllm.v1.engine.output_processor import RequestState

    make, complete = IncrementalDetokenizer.from_new_request, RequestState._new_completion_output

    def from_new_request(tokenizer, request):
        made: Any = make(tokenizer, request)
        if (request.sampling_params.extra_args or {}).get("return_recurrences"):
            made.texts, made.work, made.joined = [], [], 0
            if decode := getattr(made, "decode_next", None):  # without a tokenizer, there is no text

                def decode_next(token: int) -> str:
                    made.texts.append(text := decode(token))
                    return text

                made.decode_next = decode_next
        return made

    def completion_output(self, *args, **kwargs):
        output: Any = complete(self, *args, **kwargs)
        if hasattr(made := self.detokenizer, "texts"):
            chunks = self.routed_experts_chunks
            for chunk in chunks[made.joined :]:
                made.work.extend(chunk.tolist())
            made.joined = len(chunks)
            output.routed_experts = Tokens(made.work if chunks else None, made.texts)
        return output

    IncrementalDetokenizer.from_new_request = staticmethod(from_new_request)  # pyright: ignore[reportAttributeAccessIssue]
    RequestState._new_completion_output = completion_output
