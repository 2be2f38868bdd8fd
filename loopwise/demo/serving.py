"""Part (c): both models on vLLM servers, with requests from the `openai` client."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .chains import TASK
from .processes import Server, loopwise

QUESTION = "What is the capital of France? Answer in one sentence."
CHAINS = f"{TASK}&hops=1+2+4+6&records=200"
RULE = {"exit_rule": "cosine", "exit_threshold": 0.05, "prompt_exit": True}
DEEPEST = 16


def part(out: Path, pretrained: Path, chains: Path) -> Path:
    """Serve both models in turn, send requests, stop. Returns the picture of recurrences by group."""
    chat = Server(pretrained, out / "serve-chat.log", "--", "--enforce-eager", "--max-model-len", "1024")
    small = Server(
        chains, out / "serve-chains.log", f"max_recurrences={DEEPEST}", "kv_policy=last-exited", "--", "--enforce-eager"
    )
    with chat.running() as process:
        talk(chat.wait(process), chat)
        process.terminate()  # it ends while the other server starts and measures its step costs
        with small.running() as process:
            show(small.wait(process), small)
            data = (f"data={CHAINS}", "group=hops", f"endpoint={small.url}", "batch_size=32")
            loopwise("eval", chains, *data, "num_recurrences=1,3,8", "--out", out / "served.json")
            fields = [f"request.{name}={str(value).lower()}" for name, value in RULE.items()]
            result, picture = out / "served-by-rule.json", out / "depth.png"
            loopwise("eval", chains, *data, f"num_recurrences={DEEPEST}", *fields, "--out", result)
    loopwise("plot", "depth", result, "--out", picture)
    return picture


def talk(client: Any, server: Server) -> None:
    """Send a question to the pretrained model at several depths, and print the answers."""
    from ..train.pretrained import load_tokenizer

    print(f"\n>>> client = openai.OpenAI(base_url={server.url!r}, api_key='none')")
    if load_tokenizer(str(server.model), None).chat_template:
        asked = {"messages": [{"role": "user", "content": QUESTION}]}
        call, name = client.chat.completions.create, "chat.completions"
    else:
        asked, call, name = {"prompt": QUESTION}, client.completions.create, "completions"
    shown = ", ".join(f"{key}={value!r}" for key, value in {"model": server.name, **asked}.items())
    print(f">>> client.{name}.create({shown}, max_tokens=64, temperature=0, extra_body={{'num_recurrences': R}})")
    for depth in (1, 2, 4):
        start = time.monotonic()
        reply = call(model=server.name, **asked, max_tokens=64, temperature=0, extra_body={"num_recurrences": depth})
        choice, tokens = reply.choices[0], reply.usage.completion_tokens
        text = choice.message.content if hasattr(choice, "message") else choice.text
        speed = tokens / (time.monotonic() - start)
        print(f"R={depth}, {tokens} tokens, {speed:.1f} tokens/s: {text.strip()}", flush=True)


def show(client: Any, server: Server) -> None:
    """Send one chain of each number of hops to the small model, at fixed depths and with the exit rule."""
    from ..train.tasks import parse

    ways: list[tuple[str, dict[str, Any]]] = [(f"R={r}", {"num_recurrences": r}) for r in (1, 3, 8)]
    ways.append(("by the rule", {"num_recurrences": DEEPEST, **RULE}))
    print(f"\n>>> client = openai.OpenAI(base_url={server.url!r}, api_key='none')")
    print(
        f">>> client.completions.create(model={server.name!r}, prompt=..., max_tokens=1, temperature=0, "
        f"extra_body={{'num_recurrences': R}})  # by the rule: extra_body={ways[-1][1]}"
    )
    print(f"{'hops':>4}  {'question':<75} right  " + "  ".join(name for name, _ in ways))
    source = parse(f"{CHAINS}&split=held-out")
    for number in range(4):
        record = source.record(number)
        question, right = (message["content"] for message in record["messages"])
        cells = []
        for name, fields in ways:
            reply = client.completions.create(
                model=server.name, prompt=question, max_tokens=1, temperature=0, extra_body=fields
            )
            answer = reply.choices[0].text
            if fields["num_recurrences"] == DEEPEST:
                answer += f" after {reply.usage.recurrences['mean']:.0f} recurrences"
            cells.append(f"{answer:>{len(name)}}")
        print(f"{record['hops'][0]:>4}  {question:<75} {right:>5}  " + "  ".join(cells), flush=True)
