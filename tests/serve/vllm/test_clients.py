"""The libraries that people talk to such a server with. Those that are no part of the pinned environment come into one
of this file's own, which sees the running one's packages, too."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loopwise.serve import Engine
from loopwise.serve.offline import Completion, Params
from tests.helpers.serve_tiny import GROUPED, RETROFIT, generate, save, source_config, tokenizer
from tests.helpers.serving import Server, metric, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
CLIENTS = ["langchain-openai==1.7.4", "litellm==1.110.2", "lm-eval[api]==0.4.13", "guidellm==0.8.1"]
TOKENS = 16
PROMPT = "def f(x):"
RULES = [{"num_recurrences": 5}, {"num_recurrences": 6, "exit_rule": "latent-diff", "exit_threshold": 0.7}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model's directory, and the model. Its depth is 3 unless a request asks for another.

    It writes ASCII: vLLM keeps back bytes at the end of a text that are no character yet.
    """
    folder = tmp_path_factory.mktemp("clients") / "tiny"
    made: Any = save(folder, source_config("llama", **GROUPED), **RETROFIT, num_recurrences=3, max_recurrences=8)
    with torch.no_grad():
        for token, weight in enumerate(made.get_output_embeddings().weight):
            if token > 255 or not text([token]).isascii():
                weight.zero_()
    made.save_pretrained(folder)
    return folder, made


@pytest.fixture(scope="module")
def server(model):
    with serving(model[0]) as started:
        yield started


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment with the CLIENTS."""
    folder = tmp_path_factory.mktemp("clients") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    own = next(folder.glob("lib/python*/site-packages"))
    (own / "seen.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    interpreter = folder / "bin" / "python"
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *CLIENTS], check=True, timeout=1200)
    return interpreter


@pytest.fixture(scope="module")
def offline(model):
    """The offline engine's text for the prompt, as it is or as a chat's first message."""
    engine = Engine(model[0], dtype="float32")
    message = [{"role": "user", "content": PROMPT}]

    def answer(fields: dict[str, Any], chat: bool = False) -> Completion:
        prompt = tokenizer().apply_chat_template(message, tokenize=False) if chat else PROMPT
        return engine.generate([prompt], Params(max_tokens=TOKENS, ignore_eos=True, **fields))[0]

    return answer


def test_the_offline_engine_is_transformers(model, offline):
    """The expected answers of all clients."""
    assert offline(RULES[0]).tokens == generate(model[1], ids(PROMPT), 5, TOKENS).tokens


@pytest.mark.parametrize("fields", RULES, ids=["fixed", "latent-diff"])
def test_openai(server, offline, fields):
    import openai

    client: Any = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)
    more = {"ignore_eos": True, "return_recurrences": True, **fields}
    given = {"model": "tiny", "temperature": 0, "max_tokens": TOKENS, "extra_body": more}
    stream = {"stream": True, "stream_options": {"include_usage": True}}

    want = offline(fields)
    assert "exit_rule" not in fields or min(want.depths) < 6
    reply = client.completions.create(**given, prompt=PROMPT)
    chunks = list(client.completions.create(**given, **stream, prompt=PROMPT))
    assert reply.choices[0].text == want.text
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == want.text
    for usage in (reply.usage, chunks[-1].usage):
        assert usage.recurrences == recurrences(want)
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), TOKENS)

    want, message = offline(fields, chat=True), [{"role": "user", "content": PROMPT}]
    assert "exit_rule" not in fields or min(want.depths) < 6
    reply = client.chat.completions.create(**given, messages=message)
    chunks = list(client.chat.completions.create(**given, **stream, messages=message))
    assert reply.choices[0].message.content == want.text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == want.text
    for usage in (reply.usage, chunks[-1].usage):
        assert usage.recurrences == recurrences(want)
        assert usage.completion_tokens == TOKENS


def recurrences(want: Completion) -> dict[str, Any]:
    total = sum(want.depths)
    return {"mean": total / TOKENS, "total": total, "per_token": [want.depths]}


def test_openai_at_all_depths_at_once(server, offline):
    import openai

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            given = {"model": "tiny", "temperature": 0, "max_tokens": TOKENS, "prompt": PROMPT}
            bodies = [{"ignore_eos": True, "num_recurrences": depth} for depth in range(1, 9)]
            replies = await asyncio.gather(*(client.completions.create(**given, extra_body=body) for body in bodies))
            return [reply.choices[0].text for reply in replies]

    assert asyncio.run(ask()) == [offline({"num_recurrences": depth}).text for depth in range(1, 9)]


LANGCHAIN = """
import openai
from langchain_openai import ChatOpenAI, OpenAI
given = dict(base_url=url, api_key="none", model="tiny", temperature=0, max_tokens=tokens, max_retries=0)
llm = OpenAI(**given, extra_body=fields)
chat = ChatOpenAI(**given, model_kwargs={"extra_body": fields})
said = {"text": llm.invoke(prompt), "streamed": "".join(llm.stream(prompt))}
reply = chat.invoke(prompt)
said["chat"], said["usage"] = reply.content, reply.response_metadata["token_usage"]
parts = list(chat.stream(prompt, stream_usage=True))
said["chat_streamed"] = "".join(part.content for part in parts)
said["streamed_tokens"] = sum(part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata)
try:
    ChatOpenAI(**given, extra_body={"num_recurrences": 9}).invoke(prompt)
except openai.BadRequestError as error:
    said["error"] = str(error)
"""

LITELLM = """
import litellm
given = dict(api_base=url, api_key="none", temperature=0, max_tokens=tokens)
talk = dict(given, model="openai/tiny", messages=[{"role": "user", "content": prompt}])
write = dict(given, model="text-completion-openai/tiny", prompt=prompt, extra_body=fields)
stream = dict(stream=True, stream_options={"include_usage": True})
said = {"text": litellm.text_completion(**write).choices[0].text}
said["streamed"] = "".join(p.choices[0].text or "" for p in litellm.text_completion(**write, stream=True))
reply = litellm.completion(**talk, **fields)
said["chat"], said["usage"] = reply.choices[0].message.content, reply.usage.model_dump()
parts = list(litellm.completion(**talk, **stream, extra_body=fields))
said["chat_streamed"] = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
said["streamed_tokens"] = parts[-1].usage.completion_tokens
try:
    litellm.completion(**talk, num_recurrences=9)
except litellm.BadRequestError as error:
    said["error"] = str(error)
"""


@pytest.mark.parametrize("fields", RULES, ids=["fixed", "latent-diff"])
@pytest.mark.parametrize("script", [LANGCHAIN, LITELLM], ids=["langchain", "litellm"])
def test_wrappers_of_openai(python, server, offline, script, fields):
    fields = {"ignore_eos": True, "return_recurrences": True, **fields}
    said = run(python, script, {"url": server.url + "/v1", "prompt": PROMPT, "tokens": TOKENS, "fields": fields})
    depth = {name: value for name, value in fields.items() if name not in ("ignore_eos", "return_recurrences")}
    plain, chat = offline(depth), offline(depth, chat=True)
    assert said["text"] == said["streamed"] == plain.text
    assert said["chat"] == said["chat_streamed"] == chat.text
    assert said["usage"]["recurrences"] == recurrences(chat)
    assert said["usage"]["completion_tokens"] == said["streamed_tokens"] == TOKENS
    assert "num_recurrences=9: an integer from 1 to 8" in said["error"]


LM_EVAL = """
import loopwise.model
from lm_eval import simple_evaluate
task = dict(task="local", dataset_path="json", dataset_kwargs={"data_files": {"test": data}}, test_split="test",
    output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="{{choices}}", doc_to_target="{{0}}",
    target_delimiter="", metric_list=[dict(metric="acc", aggregation="mean", higher_is_better=True)])
def scores(kind, /, **args):
    done = simple_evaluate(model=kind, model_args=args, tasks=[dict(task)], log_samples=True, bootstrap_iters=0)
    samples = sorted(done["samples"]["local"], key=lambda sample: sample["doc_id"])
    return [pair for sample in samples for pair in sample["filtered_resps"]]
said = {"served": scores("local-completions", model="tiny", base_url=url, tokenizer=folder, max_length=512,
    tokenizer_backend="huggingface", num_concurrent=2, batch_size=4)}
for depth in (3, 4):
    said[str(depth)] = scores("hf", pretrained=folder, dtype="float32", device="cpu", num_recurrences=depth)
"""


def test_lm_eval_scores_as_on_transformers(python, server, model, tmp_path):
    """Log-likelihoods of three answers to each of eight questions, the first of them the model's own."""
    draw, lines = random.Random(0), []
    while len(lines) < 8:
        question, *others = ("".join(draw.choices("abcdefgh", k=draw.randint(2, 50))) for _ in range(3))
        own = text(generate(model[1], ids(question), 3, 1).tokens)
        if own.isascii() and own.isprintable():
            lines.append(json.dumps({"q": question, "choices": [own, *others]}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    given = {"url": server.url + "/v1/completions", "folder": str(model[0]), "data": str(tmp_path / "data.jsonl")}
    said = run(python, LM_EVAL, given)
    likelihoods = {name: [pair[0] for pair in pairs] for name, pairs in said.items()}
    assert likelihoods["served"] == pytest.approx(likelihoods["3"], abs=1e-3)
    assert likelihoods["served"] != pytest.approx(likelihoods["4"], abs=1e-1)
    assert [pair[1] for pair in said["served"]] == [pair[1] for pair in said["3"]] == [True, False, False] * 8


VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
add_cli_args(parser := FlexibleArgumentParser())
said = main(parser.parse_args(arguments))
said = {name: said[name] for name in ("completed", "failed", "output_lens")}
"""


def test_vllm_bench(server, model):
    flags = {"base-url": server.url, "model": "tiny", "tokenizer": str(model[0]), "num-prompts": "24"}
    flags |= {"random-input-len": "24", "random-output-len": str(TOKENS), "request-rate": "20"}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    arguments += ["--extra-body", '{"num_recurrences": 2}', "--ignore-eos", "--disable-tqdm", "--save-detailed"]
    before = exits_at(server, 2)
    said = run(Path(sys.executable), VLLM_BENCH, {"arguments": arguments})
    assert (said["completed"], said["failed"], said["output_lens"]) == (24, 0, [TOKENS] * 24)
    assert exits_at(server, 2) - before >= 24 * TOKENS


def test_guidellm(python, server, model, tmp_path):
    backend = {"kind": "openai_http", "target": server.url, "model": "tiny", "request_format": "/v1/completions"}
    backend["extras"] = {"body": {"num_recurrences": 4}}
    flags = {"backend": json.dumps(backend), "profile": "kind=concurrent,streams=4"}
    flags |= {"constraint": "kind=max_requests,count=20", "output": f"kind=json,path={tmp_path / 'report.json'}"}
    flags |= {"tokenizer": f"kind=huggingface_auto,model={model[0]}"}
    flags |= {"data": f"kind=synthetic_text,prompt_tokens=24,output_tokens={TOKENS}"}
    before = exits_at(server, 4)
    command = [python, "-m", "guidellm", "run", "--disable-console", *(f"--{n}={v}" for n, v in flags.items())]
    subprocess.run(command, check=True, timeout=300, stdin=subprocess.DEVNULL)
    report = json.loads((tmp_path / "report.json").read_text())["benchmarks"][0]
    assert [len(report["requests"][kind]) for kind in ("successful", "errored", "incomplete")] == [20, 0, 0]
    assert {request["output_metrics"]["text_tokens"] for request in report["requests"]["successful"]} == {TOKENS}
    assert exits_at(server, 4) - before >= 20 * TOKENS


def ids(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


def text(ids: list[int]) -> str:
    return str(tokenizer().decode(ids))


def exits_at(server: Server, depth: int) -> float:
    """Tokens that left at `depth` so far."""
    deeper, shallower = (metric(server, f'loopwise:exit_depth_bucket{{le="{n}.0"') for n in (depth, depth - 1))
    return deeper - shallower


def run(python: Path, script: str, given: dict[str, Any]) -> dict[str, Any]:
    """The value of `said` after `script`, started with the variables `given`."""
    program = f"import json, sys\nglobals().update(json.loads(sys.argv[1]))\n{script}\nprint('\\n' + json.dumps(said))"
    done = subprocess.run(
        [python, "-c", program, json.dumps(given)],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
