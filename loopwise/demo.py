"""The main job end to end, on real text: `python -m loopwise.demo [--text PATH] [--out DIR]`.

Train a small base model, convert it, retrain it, measure it, serve it, ask it. Every step is a public command, printed
before it runs; with a pretrained model (HuggingFaceTB/SmolLM2-135M, say) one starts at `loopwise convert`.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .arguments import Parser
from .cli import guarded
from .errors import UserError

VOCABULARY, SEQUENCE = 1024, 128
BASE_STEPS, RETRAIN_STEPS, DEPTHS = 600, 240, [1, 2, 4, 8]
HELD_OUT_BYTES = 150_000
MINIMUM_BYTES = 1_000_000


def main(argv: list[str]) -> int:
    """Run the demo; returns an exit code."""
    parser = Parser(prog="loopwise.demo", description="Train, convert, retrain and serve a small model.")
    parser.add_argument(
        "--text", metavar="PATH", help="a text file or a directory of them; default Python's own library"
    )
    parser.add_argument(
        "--out", metavar="DIR", default="demo-run", help="where everything is written (default demo-run)"
    )
    args = parser.parse_args(argv)
    try:
        demo(Path(args.out), Path(args.text) if args.text else None)
    except subprocess.CalledProcessError as error:
        print(f"loopwise: error: the step above ended with exit code {error.returncode}", file=sys.stderr)
        return 1
    return 0


def demo(out: Path, text: Path | None) -> None:
    """All steps; raises UserError for text that will not do, CalledProcessError where a step fails."""
    start = time.monotonic()
    documents = list(read_documents(text))
    if out.exists():
        if not (out / ".loopwise-demo").is_file():
            raise UserError(f"{out} exists and is not a demo's; choose another directory with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / ".loopwise-demo").touch()
    train, held_out = split(documents, out)
    fresh, base, converted, retrained = (str(out / name) for name in ("fresh", "base", "converted", "retrained"))
    print(f"== a fresh Llama-style model with a byte-level BPE tokenizer: {fresh}", flush=True)
    create_base(train, Path(fresh))
    data = [f"data.train={train}", f"data.sequence_length={SEQUENCE}", "batch_size=8", "log_every=80"]
    loopwise(
        "train", fresh, base, *data, f"steps={BASE_STEPS}", "optimiser.learning_rate=5e-3", "optimiser.warmup=0.05"
    )
    loopwise("convert", base, converted, "--recipe", "demo")
    loopwise("train", converted, retrained, "--recipe", "demo", *data, f"steps={RETRAIN_STEPS}")
    measured = {
        name: measure(path, held_out, depths)
        for name, path, depths in (
            ("base", base, None),
            ("converted", converted, DEPTHS),
            ("retrained", retrained, DEPTHS),
        )
    }
    prompt = "def __init__(self, " if text is None else " ".join(documents[0].split()[:6])
    answer = ask(retrained, prompt)
    print(f"\n{table(measured)}\n\nprompt      {prompt!r}\ncompletion  {answer!r}\nmodel       {retrained}")
    print(f"serve it    loopwise serve {retrained}\ntook        {time.monotonic() - start:.0f} s")


def read_documents(text: Path | None) -> Iterator[str]:
    """The texts to learn from. Raises UserError where there are none, or too few."""
    if text is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "site-packages", "idle_test", "lib2to3"}
        files = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
    elif text.is_dir():
        files = [p for p in sorted(text.rglob("*")) if p.is_file()]
    elif text.is_file():
        files = [text]
    else:
        raise UserError(f"{text}: no such file or directory")
    size = 0
    for file in files:
        try:
            document = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        size += len(document)
        if text is not None and len(files) == 1:  # one long file: paragraphs, so that some can be held out
            yield from (part for part in document.split("\n\n") if part.strip())
        elif document.strip():
            yield document
    if size < MINIMUM_BYTES:
        raise UserError(f"{text}: {size:,} characters of text; the demo needs at least {MINIMUM_BYTES:,}")


def split(documents: list[str], out: Path) -> tuple[Path, Path]:
    """Write train.jsonl and held_out.jsonl: every 20th document is held out, up to HELD_OUT_BYTES."""
    held, kept, size = [], [], 0
    for number, document in enumerate(documents):
        if number % 20 == 10 and size < HELD_OUT_BYTES:
            held.append(document)
            size += len(document)
        else:
            kept.append(document)
    paths = out / "train.jsonl", out / "held_out.jsonl"
    for path, texts in zip(paths, (kept, held), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths


def create_base(train: Path, out: Path) -> None:
    """An untrained Llama of 1.2 M parameters, with a tokenizer trained on `train`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from .quiet import quiet

    quiet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    with train.open() as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    fast.save_pretrained(out)


def loopwise(*argv: str) -> None:
    """Print a command, then run it."""
    print(f"\n$ loopwise {shlex.join(argv)}", flush=True)
    subprocess.run([sys.executable, "-m", "loopwise", *argv], check=True)


def measure(model: str, held_out: Path, depths: list[int] | None) -> dict[str, Any]:
    """What `loopwise eval --json` says of `model`, at each of `depths`."""
    argv = ["eval", model, f"data={held_out}", f"sequence_length={SEQUENCE}"]
    if depths is not None:
        argv.append(f"num_recurrences={','.join(map(str, depths))}")
    print(f"\n$ loopwise {shlex.join(argv)}", flush=True)
    command = [sys.executable, "-m", "loopwise", *argv, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def table(measured: dict[str, dict[str, Any]]) -> str:
    """Held-out loss (nats per token) of each model at each depth."""
    lines = ["held-out loss    parameters   " + "".join(f"{f'R={r}':>9}" for r in DEPTHS)]
    for name, result in measured.items():
        at = {row["num_recurrences"]: f"{row['loss']:.3f}" for row in result["results"]}
        cells = [at[None]] if None in at else [at[r] for r in DEPTHS]
        lines.append(f"{name:<15}{result['parameters']:>12,}   " + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def ask(model: str, prompt: str) -> str:
    """Serve `model` with vLLM, ask it for a completion through the openai client, stop the server."""
    import openai

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = ["serve", model, f"port={port}", "--", "--max-model-len", "512"]
    print(f"\n$ loopwise {shlex.join(argv)}", flush=True)
    log = Path(model).parent / "serve.log"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "loopwise", *argv]
        server = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            name = _wait(client, server, log)
            print(
                f"openai.OpenAI(base_url='http://127.0.0.1:{port}/v1').completions.create(model={name!r}, ...)",
                flush=True,
            )
            reply = client.completions.create(model=name, prompt=prompt, max_tokens=48, temperature=0)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    return reply.choices[0].text


def _wait(client: Any, server: subprocess.Popen, log: Path) -> str:
    """The name of the served model, once the server answers."""
    import openai

    for _ in range(600):
        if server.poll() is not None:
            raise UserError(f"the server ended with exit code {server.returncode}; its output is in {log}")
        try:
            return client.models.list(timeout=5).data[0].id
        except openai.APIConnectionError:
            time.sleep(0.5)
    raise UserError(f"the server did not answer within 5 minutes; its output is in {log}")


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
