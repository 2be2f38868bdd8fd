"""The depths at which the tokens of a running server have left, from its /metrics."""

from __future__ import annotations

import re
from http.client import HTTPException
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.request import urlopen

from ...errors import UserError, reason

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRIC = "loopwise:exit_depth"
SECONDS = 10  # for the server's reply


def exit_counts(url: str) -> dict[int, int]:
    """Tokens by the recurrences after which they were read out, since the start of the server at `url`.

    url: with or without /v1 or /metrics. Raises UserError where no lane engine of Loopwise answers.
    """
    address = re.sub(r"/(v1|metrics)?/?$", "", url) + "/metrics"
    try:
        with urlopen(address, timeout=SECONDS) as reply:
            text = reply.read().decode()
    except (URLError, HTTPException, ValueError, OSError) as error:
        raise UserError(f"{address}: no server answers there ({reason(error)})") from None
    return counted(text, address)


def counted(text: str, address: str) -> dict[int, int]:
    """Tokens by depth from the text of /metrics, whose buckets count up. Raises UserError for other metrics."""
    below = {
        int(float(bound)): int(float(count))
        for bound, count in re.findall(rf'^{METRIC}_bucket{{[^}}]*le="([\d.]+)"[^}}]*}} (\S+)', text, re.MULTILINE)
    }
    if not below:
        raise UserError(f"{address}: no {METRIC} there: it takes `loopwise serve` with engine=lanes, and a request")
    depths = sorted(below)
    before = [0, *(below[depth] for depth in depths[:-1])]
    return {depth: below[depth] - less for depth, less in zip(depths, before, strict=True)}


def exits_figure(counts: dict[int, int], name: str) -> Figure:
    """A histogram of `counts` by depth. Raises UserError where nothing was counted yet."""
    from matplotlib.figure import Figure

    total = sum(counts.values())
    if not total:
        raise UserError(f"{name}: no token has been generated yet")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(list(counts), list(counts.values()), color="0.6")
    axes.bar_label(bars, [f"{count / total:.0%}" for count in counts.values()], fontsize="small")
    axes.margins(y=0.1)
    axes.set_xticks(list(counts))
    axes.set_xlabel("recurrences")
    axes.set_ylabel("generated tokens")
    mean = sum(depth * count for depth, count in counts.items()) / total
    axes.set_title(f"{name}: {total:,} tokens, {mean:.2f} recurrences each", fontsize="medium")
    return figure
