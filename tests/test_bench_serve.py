"""The comparison over HTTP: the same arrivals with and without waves, and times of the plain requests alone."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from bench import over_http
from bench.figures import FILE, read
from bench.forced import DEPTHS, OUTPUT, jobs
from bench.over_http import Arrival, Times, arrivals, beside_waves, closed_loops, decoded_by, open_loop, percentile


def test_arrivals_repeat_whatever_the_decoder():
    one, again = (arrivals(3, 40.0, 5.0, "full", 0.25) for _ in range(2))
    assert one == again
    assert one != arrivals(4, 40.0, 5.0, "full", 0.25)
    assert one[0].at == 0.0
    assert all(a.at < b.at < 5.0 for a, b in pairwise(one))
    assert 140 < len(one) < 260
    assert 0.15 < sum(arrival.wave for arrival in one) / len(one) < 0.35
    assert not any(arrival.wave for arrival in arrivals(3, 40.0, 5.0, "full"))


def test_percentiles_lie_within_the_times():
    assert percentile([4.0], 99) == 4.0
    assert percentile([float(n) for n in range(101)], 99) == 99.0
    assert percentile([1.0, 2.0], 99) <= 2.0
    assert Times(first=[1.0, 3.0]).percentiles()["first token, p50"] == 2.0


class Server(over_http.Server):
    """Answers at once. A plain request takes twice as long while waves run; a wave takes no time."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], dict[str, Any]]] = []
        self.slow = False

    async def ask(self, session: Any, job: Any, fields: dict[str, Any], times: Times) -> int:
        self.asked.append((job.prompt, fields))
        self.slow |= fields.get("decoder") == "wave"
        taken = 2.0 if self.slow and fields.get("decoder") != "wave" else 1.0
        times.first.append(taken)
        times.between += [taken] * 3
        times.whole.append(4 * taken)
        times.in_flight.append(1.5)
        return OUTPUT


def test_open_loops_separate_the_waves():
    job = jobs(random.Random(0), 1, "full")[0]
    due, waves, server = [Arrival(0.0, job, wave) for wave in (True, False, True)], Times(), Server()
    times = asyncio.run(open_loop(server, None, due, partial(decoded_by, "wave"), waves))
    assert [fields for _, fields in server.asked] == [{"decoder": "wave"}, {"decoder": "plain"}, {"decoder": "wave"}]
    assert (len(times.first), len(waves.first)) == (1, 2)


class Arguments:
    clients, each, pairs, seconds, waves, load = 2, 1, 2, 0.05, 0.5, "0.5"


def test_the_cost_of_waves_stands_beside_an_a_a(tmp_path, monkeypatch, capsys):
    """By a server whose plain requests take twice as long once waves run."""
    monkeypatch.setenv(FILE, str(tmp_path / "figures.jsonl"))
    server, seen = Server(), []

    async def steady(server: Any, session: Any, due: Any, fields: Any, waves: Any = None) -> Times:
        server.slow = False
        ordered = sorted(due, key=lambda one: not one.wave)  # so that the clock decides nothing
        seen.append([(one.at, one.job.prompt, one.wave) for one in due])
        return await open_loop(server, session, [one._replace(at=0.0) for one in ordered], fields, waves)

    monkeypatch.setattr(over_http, "open_loop", steady)
    monkeypatch.setattr(Server, "rate", lambda *_: asyncio.sleep(0, 1000.0 * OUTPUT))
    asyncio.run(beside_waves(Arguments(), server, None))  # pyright: ignore[reportArgumentType]
    assert len(seen) == 9
    assert all(seen[n] == seen[n + 1] == seen[n + 2] != seen[n - 1] for n in (0, 3, 6))
    assert "which had 1.50 positions in flight" in capsys.readouterr().out
    lines = read(tmp_path / "figures.jsonl")
    assert [line["what"].removeprefix("load 0.5, 50% waves: ") for line in lines] == [
        f"{what}, {p} of plain requests"
        for what in ("first token", "between chunks", "whole reply")
        for p in ("p50", "p99")
    ]
    assert {(line["value"], line["A/A"]) for line in lines} == {(2.0, 1.0)}


@pytest.mark.parametrize("load", ["", "0.5,0.9"])
def test_closed_loops_send_depths_to_lanes_alone(load, capsys):
    servers: Any = {"fixed": Server(), "lanes": Server()}
    args: Any = Arguments()
    args.load, args.pairs = load, 1
    bound = over_http.Bound(1000, 1000)
    asyncio.run(closed_loops(args, servers, None, bound))
    assert all(fields == {} for _, fields in servers["fixed"].asked)
    full = {"num_recurrences": DEPTHS}  # as users ask for it
    traces = [(len(prompt), fields["trace"]) for prompt, fields in servers["lanes"].asked if fields != full]
    assert 0 < len(traces) < len(servers["lanes"].asked)
    assert all(len(trace) == length + OUTPUT and {*trace} != {DEPTHS} for length, trace in traces)
    assert capsys.readouterr().out.count("requests/s") == (2 if load else 0)
