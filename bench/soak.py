"""A server under mixed load for an hour: the memory of its API and engine processes apart, which must stay flat.

    python -m bench.soak MODEL [--seconds 3600] [--clients 32] [--seed 0] [--out soak]

The clients ask for mixed depths, exit rules, decoders, prompts, streams and grammars. Some leave early, some read
slowly, some send bad bodies. The pool of cache blocks is small, so that requests are preempted. OUT.json holds memory,
open files and answers over time, OUT.png draws them. Exits 1 for an answer of 500 and above, a request without an end,
a kind of request that is never answered with 200, a load that preempts nothing, or a process whose memory in the last
tenth is more than 2 % above that after the first quarter.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

PATIENCE = 300.0  # seconds after which a request counts as stuck
# A cache for six requests of the mean length, which grow past it: some are preempted.
FLAGS = ("--enforce-eager", "--max-num-seqs", "24", "--block-size", "32", "--num-gpu-blocks-override", "24")
RULES = ("latent-diff", "cosine", "kl", "minp-kl", "entropy-diff", "argmax-stability")
BAD = [b"{", b"[]", b'"text"', b'{"model": "m"}', b"\xff" * 100, b'{"model": "m", "prompt": "a", "num_recurrences": 0}']
BAD += [
    json.dumps({"model": "m", "prompt": "a", **fields}).encode()
    for fields in (
        {"num_recurrences": 1e9},
        {"exit_rule": {}},
        {"exit_rule": "cosine", "exit_threshold": -1},
        {"trace": [[1]]},
        {"vllm_xargs": 3},
        {"exit_rules": "fixed"},
        {"max_tokens": -1},
        {"decoder": "beam"},
    )
]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two choices": {"temperature": 1.0, "n": 2},
    "log-probabilities": {"logprobs": 2},
    "stop": {"stop": ["a"]},
    "grammar": {"structured_outputs": {"regex": "[0-9]{2}"}},
    "exits of prompts": {"prompt_exit": True, "exit_rule": "latent-diff", "exit_threshold": 0.5},
    "depths": {"return_recurrences": True},
    "trace": {"trace": [1, 2, 3, 2] * 64, "num_recurrences": 3},
    "wave": {"decoder": "wave", "max_in_flight": 4},
    "diffusion": {"decoder": "diffusion"},
    "sampled": {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "logit_bias": {"65": 2}},
}


def body(draw: random.Random, longest: int) -> tuple[str, str, dict[str, Any]]:
    """(kind, route, body) of a request. longest: tokens of a prompt."""
    found: dict[str, Any] = {"model": "m", "max_tokens": draw.randint(1, 40), "stream": draw.random() < 0.5}
    found["num_recurrences"] = draw.randint(1, 8)
    kind = draw.choice([*KINDS])
    found |= KINDS[kind]
    if draw.random() < 0.5 and "exit_rule" not in found and "trace" not in found and "decoder" not in found:
        found |= {"exit_rule": draw.choice(RULES)}
    if draw.random() < 0.3 and "logprobs" not in found:
        words = " ".join(draw.choice(("depth", "core", "state", "loop")) for _ in range(draw.randint(1, 20)))
        return kind, "chat/completions", {**found, "messages": [{"role": "user", "content": words}]}
    return kind, "completions", {**found, "prompt": [draw.randrange(250) for _ in range(draw.randint(1, longest))]}


class Load:
    """Clients of one server. answers: how often each status came; `left` and `slow` are clients that went away.
    kinds: how often each kind of request was answered with 200."""

    def __init__(self, port: int, seed: int, longest: int):
        self.port, self.seed, self.longest = port, seed, longest
        self.answers: Counter[str] = Counter()
        self.kinds = Counter(dict.fromkeys(KINDS, 0))
        self.number = 0
        self.examples: dict[str, str] = {}  # the first body and answer of each status

    async def run(self, clients: int, done: Callable[[], bool]) -> None:
        """Let `clients` send one request after the other until `done`."""
        import aiohttp

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
            await asyncio.gather(*(self._client(session, done) for _ in range(clients)))

    async def _client(self, session: Any, done: Callable[[], bool]) -> None:
        while not done():
            self.number += 1
            draw = random.Random(f"{self.seed} {self.number}")
            kind = draw.random()
            if kind < 0.1:
                await self.ask(session, "", "completions", draw.choice(BAD), PATIENCE)
            elif kind < 0.2:
                await self.ask(session, *self.encoded(draw), draw.uniform(0.001, 0.5))
            elif kind < 0.25:
                await self.read_slowly(draw)
            else:
                await self.ask(session, *self.encoded(draw), PATIENCE)

    def encoded(self, draw: random.Random) -> tuple[str, str, bytes]:
        kind, route, found = body(draw, self.longest)
        return kind, route, json.dumps(found).encode()

    async def ask(self, session: Any, kind: str, route: str, content: bytes, patience: float) -> None:
        """Send a request and read its answer, or leave after `patience` seconds."""
        import aiohttp

        headers = {"Content-Type": "application/json"}
        try:
            async with asyncio.timeout(patience):
                url = f"http://127.0.0.1:{self.port}/v1/{route}"
                async with session.post(url, data=content, headers=headers) as reply:
                    text = await reply.text()
                    self.answers[str(reply.status)] += 1
                    if reply.status == 200:
                        self.kinds[kind] += 1
                    self.examples.setdefault(str(reply.status), f"{content[:300]!r} -> {text[:300]}")
        except TimeoutError:
            self.answers["stuck" if patience == PATIENCE else "left"] += 1
        except aiohttp.ClientError as error:
            self.answers["without an answer"] += 1
            self.examples.setdefault("without an answer", f"{content[:300]!r} -> {error!r}")

    async def read_slowly(self, draw: random.Random) -> None:
        """Ask for a stream, read a few bytes of it now and then, and leave."""
        _, route, found = body(draw, self.longest)
        content = json.dumps({**found, "stream": True, "max_tokens": 200}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=256)
        head = f"POST /v1/{route} HTTP/1.1\r\nHost: m\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        for _ in range(draw.randint(1, 40)):
            if not await reader.read(64):
                break
            await asyncio.sleep(0.1)
        writer.close()
        self.answers["slow"] += 1


def sample(server: psutil.Process) -> dict[str, dict[str, int]]:
    """Memory in bytes (unique set size) and open files of the API process, and of the engine's."""
    found = {"api": {"memory": 0, "files": 0}, "engine": {"memory": 0, "files": 0}}
    for process in (server, *server.children(recursive=True)):
        of = found["api" if process == server else "engine"]
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper that has ended meanwhile
            of["memory"] += process.memory_full_info().uss
            of["files"] += process.num_fds()
    return found


def judge(samples: list[dict[str, Any]], load: Load, preempted: int, flat: float) -> list[str]:
    """The faults of a soak, in words. flat: most that memory may be at the end, over that of the first quarter."""
    fine = ("left", "slow")
    wrong = [f"{n} answers: {status}" for status, n in load.answers.items() if status >= "500" and status not in fine]
    wrong += [f"no answer 200 to a request of the kind: {kind}" for kind, n in load.kinds.items() if not n]
    wrong += [] if preempted else ["no request was preempted"]
    quarter, tenth = len(samples) // 4, max(1, len(samples) // 10)
    for name in ("api", "engine"):
        for what, limit in (("memory", flat), ("files", 1.1)):
            values = [sample[name][what] for sample in samples]
            early, late = (sum(part) / len(part) for part in (values[quarter : quarter + tenth], values[-tenth:]))
            print(f"{name} {what}: {early:,.0f} after the first quarter, {late:,.0f} at the end, {late / early:.4f}")
            if late > limit * early:
                wrong.append(f"{what} of {name} grew to {late / early:.3f}")
    return wrong


def draw(samples: list[dict[str, Any]], file: Path) -> None:
    """Draw memory and open files over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    minutes = [sample["seconds"] / 60 for sample in samples]
    for name in ("api", "engine"):
        above.plot(minutes, [sample[name]["memory"] / 2**20 for sample in samples], label=f"{name} process")
        below.plot(minutes, [sample[name]["files"] for sample in samples], label=f"{name} process")
    above.set(ylabel="memory of its own, MiB", ylim=(0, None), title=f"{samples[-1]['requests']:,} requests")
    below.set(ylabel="open files", xlabel="minutes", ylim=(0, None))
    above.legend()
    figure.savefig(file, dpi=120)


async def soak(server: psutil.Process, load: Load, seconds: float, clients: int) -> list[dict[str, Any]]:
    """Run the clients for `seconds`. Returns a sample every 1/360 of the time, at least a second apart."""
    begin, samples = time.monotonic(), []
    running = asyncio.create_task(load.run(clients, lambda: time.monotonic() >= begin + seconds))
    while not running.done():
        await asyncio.wait([running], timeout=max(1.0, seconds / 360))
        now = time.monotonic() - begin
        samples.append({"seconds": now, "requests": load.number, **await asyncio.to_thread(sample, server)})
    await running
    return samples


def start(model: Path, port: int, log: Path) -> subprocess.Popen:
    """A server of `model` that preempts."""
    command = [sys.executable, "-m", "loopwise", "serve", str(model), f"port={port}", "name=m", "kv_policy=last-exited"]
    command += ["--", *FLAGS]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


async def preemptions(port: int) -> int:
    """The requests that the server has preempted."""
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as reply:
        lines = (await reply.text()).splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("vllm:num_preemptions_total{"))


async def ready(process: subprocess.Popen, port: int, log: Path) -> None:
    """Wait until the server answers. Raises SystemExit where it ends instead."""
    import aiohttp

    async with aiohttp.ClientSession() as session:
        while process.poll() is None:
            try:
                async with session.get(f"http://127.0.0.1:{port}/health") as reply:
                    if reply.status == 200:
                        return
            except aiohttp.ClientError:
                await asyncio.sleep(0.5)
    raise SystemExit(log.read_text()[-3000:])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--longest", type=int, default=200, help="tokens of the longest prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--flat", type=float, default=1.02, help="most memory at the end, over that of the first quarter"
    )
    parser.add_argument("--out", type=Path, default=Path("soak"))
    args = parser.parse_args(argv)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = args.out.with_suffix(".log")
    process = start(args.model, port, log)
    load = Load(port, args.seed, args.longest)
    try:
        asyncio.run(ready(process, port, log))
        samples = asyncio.run(soak(psutil.Process(process.pid), load, args.seconds, args.clients))
        preempted = asyncio.run(preemptions(port))
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    found = {"answers": load.answers, "kinds": load.kinds, "preempted": preempted, "examples": load.examples}
    found |= {"exit code": code, "samples": samples}
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    draw(samples, args.out.with_suffix(".png"))
    print(f"{load.number:,} requests: {dict(sorted(load.answers.items()))}; the server ended with {code}")
    print(f"answered with 200: {dict(load.kinds)}; {preempted:,} preempted")
    wrong = judge(samples, load, preempted, args.flat) + ([f"the server ended with {code}"] if code else [])
    print(*wrong or ["flat"], sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
