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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .figures import add
from .forced import OUTPUT, Bound, Job, jobs, report, share

CACHE, SHARE = 1 << 30, 0.4  # bytes of an engine's cache; its share of a GPU, on which several are


@dataclass
class Times:
    """Seconds: to the first token, between chunks, and of whole replies. in_flight: mean positions of each reply."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    in_flight: list[float] = field(default_factory=list)

    def percentiles(self) -> dict[str, float]:
        """p50 and p99 of each of the three times, as far as there are some."""
        three = {"first token": self.first, "between chunks": self.between, "whole reply": self.whole}
        return {f"{name}, p{p}": percentile(of, p) for name, of in three.items() if of for p in (50, 99)}


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


class Arrival(NamedTuple):
    """A request of an open loop. at: seconds after the beginning.   wave: it may be one."""

    at: float
    job: Job
    wave: bool = False


def arrivals(seed: int, rate: float, seconds: float, system: str, waves: float = 0.0) -> list[Arrival]:
    """Poisson arrivals of `rate` requests a second: the first at once, then for so many seconds. waves: the share that
    may be waves."""
    draw, at, found = random.Random(seed), 0.0, list[Arrival]()
    while at < seconds:
        found.append(Arrival(at, jobs(draw, 1, system)[0], draw.random() < waves))
        at += draw.expovariate(rate)
    return found


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

    async def ask(self, session: Any, job: Job, fields: dict[str, Any], times: Times) -> int:
        """Stream one completion, with these `fields` of the request; returns its number of tokens."""
        body = {"model": "m", "prompt": job.prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}, **fields}
        began, last, tokens = time.perf_counter(), 0.0, 0
        async with session.post(f"http://127.0.0.1:{self.port}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise SystemExit(await reply.text())
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                event, now = json.loads(line[6:]), time.perf_counter()
                if usage := event.get("usage"):
                    tokens = usage["completion_tokens"]
                    if passes := usage.get("passes"):  # the fixed engine has none
                        times.in_flight.append(passes["wave"])
                elif event["choices"]:
                    if last:
                        times.between.append(now - last)
                    else:
                        times.first.append(now - began)
                    last = now
        times.whole.append(time.perf_counter() - began)
        return tokens

    async def rate(self, session: Any, clients: int, work: list[Job], fields: Any) -> float:
        """Tokens a second of a closed loop: so many clients, each of which asks when it has its answer.

        fields: of a job's request.
        """
        left = list(work)

        async def client() -> int:
            tokens = 0
            while left:
                job = left.pop()
                tokens += await self.ask(session, job, fields(job), Times())
            return tokens

        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*(client() for _ in range(clients))))
        return tokens / (time.perf_counter() - began)


async def over_http(args: argparse.Namespace, folder: Path, bound: Bound) -> None:
    import aiohttp

    compiled = ("--enforce-eager",) if args.eager else ("--no-enforce-eager",)
    seats = ("--max-num-seqs", str(args.clients))
    servers = {} if args.waves else {"fixed": Server(folder, "engine=fixed", flags=(*compiled, *seats))}
    settings = [f"kv_policy={args.policy}", f"passes_per_step={args.passes_per_step}"]
    settings += [f"coda_wait={args.coda_wait}"] if args.coda_wait is not None else []
    servers["lanes"] = Server(folder, *settings, flags=(*compiled, *seats))
    try:
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)  # the server closes what idles for 5 seconds
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            for server in servers.values():
                await server.ready(session)
            if args.waves:
                await beside_waves(args, servers["lanes"], session)
            else:
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
            forced = system != "fixed"
            rate = await server.rate(
                session, args.clients, work, lambda job, forced=forced: job.fields if forced else {}
            )
            bounds[system] = share(bound, work)
            if pair:
                rates[system].append(rate)
        print(f"pair {pair}: " + ", ".join(f"{s} {r[-1]:.0f}" for s, r in rates.items() if r), flush=True)
    report(rates, bounds)
    capacity = statistics.median(rates["exits"]) / OUTPUT
    for load in map(float, args.load.split(",") if args.load else []):
        due = arrivals(0, load * capacity, args.seconds, "exits")
        times = await open_loop(servers["lanes"], session, due, lambda one: one.job.fields)
        found = ", ".join(f"{what} {seconds * 1e3:.0f} ms" for what, seconds in times.percentiles().items())
        print(f"load {load:.2f} ({load * capacity:.2f} requests/s, {len(due)} requests): {found}", flush=True)


async def open_loop(server: Server, session: Any, due: list[Arrival], fields: Any, waves: Times | None = None) -> Times:
    """Ask for every request when it is due, whatever has been answered. Returns their times.

    fields: of an arrival's request.   waves: gets the times of those that may be waves, in place of the result.
    """
    times, tasks, began = Times(), [], time.perf_counter()
    for one in due:
        await asyncio.sleep(max(began + one.at - time.perf_counter(), 0))
        to = waves if one.wave and waves is not None else times
        tasks.append(asyncio.create_task(server.ask(session, one.job, fields(one), to)))
    await asyncio.gather(*tasks)
    return times


# ---- beside waves -------------------------------------------------------------------------------------------------
async def beside_waves(args: argparse.Namespace, server: Server, session: Any) -> None:
    """Percentiles of plain requests while `args.waves` of all are waves, against the same arrivals decoded plainly.

    All run at full depth. Of each pair, plain decoding runs twice: the second of these, A/A, shows what chance does.
    """
    for seed in (1, 2):  # the first one warms up
        work = jobs(random.Random(seed), args.clients * args.each, "full")
        capacity = await server.rate(session, args.clients, work, lambda job: {}) / OUTPUT
    for load in map(float, (args.load or "0.8").split(",")):
        ratios: dict[str, dict[str, list[float]]] = {"waves": {}, "A/A": {}}
        others = Times()
        for pair in range(args.pairs + 1):
            due = arrivals(pair, load * capacity, args.seconds, "full", args.waves)
            kinds = ["plain", "A/A", "waves"]
            found = {}
            for kind in kinds[pair % 3 :] + kinds[: pair % 3]:
                decoder = "wave" if kind == "waves" else "plain"
                apart = others if kind == "waves" else Times()
                times = await open_loop(server, session, due, partial(decoded_by, decoder), apart)
                found[kind] = times.percentiles()
            for kind, of in ratios.items() if pair else ():  # the first one warms up
                for what, base in found["plain"].items():
                    of.setdefault(what, []).append(found[kind][what] / base)
            print(f"pair {pair}: {len(due)} requests, {sum(one.wave for one in due)} of them waves", flush=True)
        tell(f"load {load:g}, {args.waves:.0%} waves", ratios, others)


def decoded_by(decoder: str, one: Arrival) -> dict[str, Any]:
    """Fields of a request that may be a wave, by this decoder if so."""
    return {"decoder": decoder if one.wave else "plain"}


def tell(where: str, ratios: dict[str, dict[str, list[float]]], waves: Times) -> None:
    """Print and note the ratios of times, of plain requests beside waves and in the A/A."""
    print(f"{where}, which had {statistics.mean(waves.in_flight or [0.0]):.2f} positions in flight; plain requests:")
    for what, values in ratios["waves"].items():
        same = ratios["A/A"][what]
        median, chance = statistics.median(values), statistics.median(same)
        spread, around = (f"{min(of):.3f} to {max(of):.3f}" for of in (values, same))
        print(f"  {what}: {median:.3f}x as long as without waves ({spread}); A/A {chance:.3f}x ({around})", flush=True)
        again = {"A/A": round(chance, 3), "A/A spread": around}
        add(f"{where}: {what} of plain requests", median, "x", spread=spread, **again)
