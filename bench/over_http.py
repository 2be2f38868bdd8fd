"""`bench.serve http`: servers, clients, closed loops and open ones."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .forced import OUTPUT, Bound, Job, jobs, report, share

CACHE, SHARE = 1 << 30, 0.4  # bytes of an engine's cache; its share of a GPU, on which several are


@dataclass
class Times:
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


class Server:
    def __init__(self, folder: Path, *settings: str, flags: tuple[str, ...] = ()):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "loopwise", "serve", str(folder), f"port={self.port}", "name=m", *settings]
        command += ["--", "--max-model-len", "256", "--block-size", "32", "--max-num-batched-tokens", "2048"]
        command += ["--kv-cache-memory-bytes", str(2 * CACHE), "--gpu-memory-utilization", str(SHARE)]
        command += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log", *flags]
        self.log = folder.parent / f"{self.port}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    async def ready(self, session: Any) -> None:
        import aiohttp

        while True:
            if self.process.poll() is not None:
                raise SystemExit(self.log.read_text()[-3000:])
            try:
                async with session.get(f"http://127.0.0.1:{self.port}/health") as reply:
                    if reply.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)

    async def ask(self, session: Any, job: Job, system: str, times: Times) -> int:
        """Stream one completion; returns its number of tokens."""
        body = {"model": "m", "prompt": job.prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if system != "fixed":
            body["trace"] = job.trace
        began, last, tokens = time.perf_counter(), 0.0, 0
        async with session.post(f"http://127.0.0.1:{self.port}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise SystemExit(await reply.text())
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                event, now = json.loads(line[6:]), time.perf_counter()
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
                elif event["choices"]:
                    if last:
                        times.between.append(now - last)
                    else:
                        times.first.append(now - began)
                    last = now
        return tokens


async def over_http(args: argparse.Namespace, folder: Path, bound: Bound) -> None:
    import aiohttp

    compiled = ("--enforce-eager",) if args.eager else ("--no-enforce-eager",)
    seats = ("--max-num-seqs", str(args.clients))
    servers = {"fixed": Server(folder, "engine=fixed", flags=(*compiled, *seats))}
    settings = [f"kv_policy={args.policy}", f"passes_per_step={args.passes_per_step}"]
    settings += [f"coda_wait={args.coda_wait}"] if args.coda_wait is not None else []
    servers["lanes"] = Server(folder, *settings, flags=(*compiled, *seats))
    try:
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)  # the server closes what idles for 5 seconds
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            for server in servers.values():
                await server.ready(session)
            await closed_loops(args, servers, session, bound)
    finally:
        for server in servers.values():
            server.process.send_signal(signal.SIGTERM)
        for server in servers.values():
            server.process.wait(60)


async def closed_loops(args: argparse.Namespace, servers: dict[str, Server], session: Any, bound: Bound) -> None:
    systems = ["fixed", "full", "exits", "prompts"]
    rates: dict[str, list[float]] = {system: [] for system in systems}
    bounds = {}
    for pair in range(args.pairs + 1):
        for system in systems:
            server = servers.get(system, servers["lanes"])
            work = jobs(random.Random(pair), args.clients * args.each, system)
            left = list(work)

            async def client(server=server, system=system, left=left) -> int:
                tokens = 0
                while left:
                    tokens += await server.ask(session, left.pop(), system, Times())
                return tokens

            began = time.perf_counter()
            tokens = sum(await asyncio.gather(*(client() for _ in range(args.clients))))
            rate = tokens / (time.perf_counter() - began)
            bounds[system] = share(bound, work)
            if pair:
                rates[system].append(rate)
        print(f"pair {pair}: " + ", ".join(f"{s} {r[-1]:.0f}" for s, r in rates.items() if r), flush=True)
    report(rates, bounds)
    capacity = statistics.median(rates["exits"]) / OUTPUT
    for load in [float(part) for part in args.load.split(",") if part]:
        await open_loop(servers["lanes"], session, load, capacity, args.seconds)


async def open_loop(server: Server, session: Any, load: float, capacity: float, seconds: float) -> None:
    """Poisson arrivals at `load` of `capacity` requests a second."""
    draw, times, tasks = random.Random(0), Times(), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        job = jobs(draw, 1, "exits")[0]
        tasks.append(asyncio.create_task(server.ask(session, job, "exits", times)))
        await asyncio.sleep(draw.expovariate(load * capacity))
    await asyncio.gather(*tasks)

    def at(values: list[float], percent: int) -> str:
        return f"{statistics.quantiles(values, n=100)[percent - 1] * 1e3:.0f} ms" if len(values) > 1 else "-"

    print(
        f"load {load:.2f} ({load * capacity:.2f} requests/s, {len(tasks)} requests): "
        f"first token p50 {at(times.first, 50)} p99 {at(times.first, 99)}; "
        f"between chunks p50 {at(times.between, 50)} p99 {at(times.between, 99)}",
        flush=True,
    )
