"""The dashboard of deploy/: its panels and queries, and what a query needs of a server's /metrics."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.repository import ROOT

FILE = ROOT / "deploy/grafana/dashboards/loopwise.json"
VARIABLES = {"$__rate_interval": "20s", "$__range": "30m", "$model": ".*"}  # as Grafana fills them in
RATES = ("rate", "increase")


def dashboard() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def filled(query: str) -> str:
    """`query` with values for Grafana's variables."""
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    return query


def queries() -> dict[str, str]:
    """The query of every target, by the panel's title and the target's letter, variables filled in."""
    return {
        f"{panel['id']} {panel['title']} {target['refId']}": filled(target["expr"])
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    }


class Need(NamedTuple):
    """A series that a query selects: its sample's name, the labels that it must have, True if a rate of it is taken."""

    name: str
    labels: frozenset[str]
    is_rate: bool


def needs(query: str) -> set[Need]:
    """The series that `query` selects. Raises ValueError for what is no PromQL."""
    found: set[Need] = set()
    around: list[Any] = []

    def enter(node: Any) -> None:
        around.append(node)
        if isinstance(node, promql_parser.VectorSelector):
            groups = [outer.modifier.labels for outer in around if getattr(outer, "modifier", None)]
            labels = {matcher.name for matcher in node.matchers.matchers}.union(*groups)
            is_rate = any(isinstance(outer, promql_parser.Call) and outer.func.name in RATES for outer in around)
            found.add(Need(node.name or "", frozenset(labels), is_rate))

    promql_parser.walk(promql_parser.parse(query), enter, lambda node: around.pop() and None)
    return found


def missing(needed: set[Need], exposition: str) -> list[str]:
    """Faults of `needed`, given the text of /metrics: no such sample, no such label, a rate of a gauge, or none of a
    counter."""
    kinds: dict[str, str] = {}
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            kinds[sample.name] = family.type
            labels.setdefault(sample.name, set()).update(sample.labels)
    faults = []
    for need in sorted(needed):
        if need.name not in kinds:
            faults.append(f"{need.name} is not there")
        elif wrong := need.labels - labels[need.name]:
            faults.append(f"{need.name} has no label {', '.join(sorted(wrong))}")
        elif need.is_rate != (kinds[need.name] != "gauge"):
            faults.append(
                f"{need.name} is a {kinds[need.name]}, of which {'no' if need.is_rate else 'a'} rate is taken"
            )
    return faults
