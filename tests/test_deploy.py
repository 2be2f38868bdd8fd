"""deploy/: the compose file, Prometheus' configuration, and Grafana's dashboard, by what runs without any of them."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from loopwise.serve.vllm import metrics
from tests.helpers.dashboard import FILE, dashboard, missing, needs, queries
from tests.helpers.repository import ROOT

DEPLOY = ROOT / "deploy"
KINDS = {"stat", "timeseries", "heatmap", "bargauge"}


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def panels() -> list[dict[str, Any]]:
    return dashboard()["panels"]


def overlaps(places: list[dict[str, int]]) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Pairs of panels' places that share a cell of the grid."""

    def apart(a: dict[str, int], b: dict[str, int], start: str, size: str) -> bool:
        return a[start] + a[size] <= b[start] or b[start] + b[size] <= a[start]

    pairs = itertools.combinations(places, 2)
    return [(a, b) for a, b in pairs if not apart(a, b, "x", "w") and not apart(a, b, "y", "h")]


def test_panels_fill_the_grid():
    """24 columns wide, nothing on top of each other, no gap in a row of panels."""
    places = [panel["gridPos"] for panel in panels()]
    assert all(place["x"] >= 0 and place["w"] > 0 and place["x"] + place["w"] <= 24 for place in places)
    assert overlaps(places) == []
    assert overlaps([places[1], {**places[1], "x": places[1]["x"] + places[1]["w"] - 1}])
    assert sum(place["w"] * place["h"] for place in places) == 24 * max(place["y"] + place["h"] for place in places)


def test_panels_have_what_grafana_asks_for():
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len({*ids})
    drawn = [panel for panel in panels() if panel["type"] != "row"]
    assert {panel["type"] for panel in drawn} == KINDS
    for panel in drawn:
        assert panel["title"], panel
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == [*"ABCDEF"[: len(letters)]], panel["title"]
        for target in panel["targets"]:
            assert target["expr"], panel["title"]
            assert target["datasource"] == panel["datasource"]
            assert target.get("range") or target.get("instant"), panel["title"]
            assert ("le" in target["legendFormat"]) == (target.get("format") == "heatmap"), panel["title"]


def test_the_dashboard_s_variables_are_those_that_it_uses():
    text = FILE.read_text()
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    used = {*re.findall(r"\$\{?(\w+)", text)} - {"__rate_interval", "__range", "__all"}
    assert used == {*variables} == {"datasource", "model"}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert variables["model"]["datasource"]["uid"] == "${datasource}"
    assert variables["model"]["query"]["query"] == "label_values(vllm:num_requests_running, model_name)"
    assert dashboard()["schemaVersion"] >= 36
    assert dashboard()["uid"]


@pytest.mark.parametrize("name", queries())
def test_queries_are_promql_on_series_of_one_model(name):
    found = needs(queries()[name])
    assert found
    assert all("model_name" in need.labels for need in found if need.name != "loopwise:lane_budget")
    assert "$" not in queries()[name]


@pytest.mark.parametrize(
    "query", ["sum(rate(x[5m])", "rate(x)[5m]", "sum by (a b) (x)", "x{a=b}", "x[$__rate_interval]"]
)
def test_what_is_no_promql_is_refused(query):
    with pytest.raises(ValueError):
        needs(query)


def exposition(monkeypatch: pytest.MonkeyPatch) -> str:
    """/metrics of the lane engine's counters, with made-up counts."""
    registry = CollectorRegistry()
    monkeypatch.setattr(metrics, "REGISTRY", registry)
    work = dict.fromkeys(("plain", "wave", "diffusion"), (3, 2, 5))
    counts = {"lanes": [0, 2, 1], "exits": [0, 1, 2], "codas": [0, 1, 1], "budget": 8, "decoders": work}
    metrics.DepthMetrics("tiny").counts = counts
    return generate_latest(registry).decode()


def test_metrics_of_depth_are_those_that_the_dashboard_shows(monkeypatch):
    """All of them, by the names of the exposition format. vLLM's are compared with a server: tests/serve/vllm."""
    text = exposition(monkeypatch)
    wanted = {need for query in queries().values() for need in needs(query) if need.name.startswith("loopwise:")}
    assert missing(wanted, text) == []
    families = set(re.findall(r"^# TYPE (loopwise:\w+) ", text, re.MULTILINE))
    shown = {re.sub("_(sum|count|bucket)$", "", need.name) for need in wanted}
    assert families == shown


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("rate(loopwise:core_passes[5m])", "loopwise:core_passes is not there"),
        ("sum by (decoder) (rate(loopwise:core_passes_total[5m]))", "loopwise:core_passes_total has no label decoder"),
        ('loopwise:lane_budget{model_name="tiny"}', "loopwise:lane_budget has no label model_name"),
        ("rate(loopwise:lane_budget[5m])", "loopwise:lane_budget is a gauge, of which no rate is taken"),
        ("loopwise:exit_depth_sum", "loopwise:exit_depth_sum is a histogram, of which a rate is taken"),
    ],
)
def test_a_wrong_query_is_named(query, fault, monkeypatch):
    assert missing(needs(query), exposition(monkeypatch)) == [fault]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's prometheus) is not installed")
def test_promtool_takes_configuration_and_queries(tmp_path):
    rules = [{"record": f"panel:{place}", "expr": query} for place, query in enumerate(queries().values())]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    for command in (["config", DEPLOY / "prometheus.yaml"], ["rules", tmp_path / "rules.yaml"]):
        done = subprocess.run(["promtool", "check", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout


def test_services_read_files_that_exist():
    services = read("compose.yaml")["services"]
    named = read("compose.yaml")["volumes"]
    for service in services.values():
        for volume in service["volumes"]:
            source = re.sub(r"\$\{[^}]*\}", "MODEL", volume).split(":")[0]
            assert source == "MODEL" or source in named or (DEPLOY / source).exists(), volume
            assert source in named or volume.endswith(":ro"), volume
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), "ports are open to this machine alone"
        if "image" in service:
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), "images have a release"


def test_the_server_s_container_is_as_the_page_on_security_asks():
    """It takes a key, and has the options of the page's own command."""
    server = read("compose.yaml")["services"]["server"]
    assert server["environment"] == ["VLLM_API_KEY"]
    page = (ROOT / "docs/security.md").read_text()
    asked = re.search(r"docker run (--read-only .*?)--publish", page, re.S)
    assert asked is not None
    assert server["read_only"] is True
    options = {"--tmpfs": server["tmpfs"], "--cap-drop": server["cap_drop"], "--env": server["environment"]}
    options["--security-opt"] = [option.removesuffix(":true") for option in server["security_opt"]]
    given = asked[1].replace("\\\n", " ").split()[1:]
    assert dict(zip(given[::2], ([value] for value in given[1::2]), strict=True)) == options


def test_places_of_the_compose_file_fit_together():
    """The server's image and port, Prometheus' target, Grafana's source and dashboard."""
    services = read("compose.yaml")["services"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert (DEPLOY / services["server"]["build"]["context"] / "Dockerfile").resolve() == ROOT / "Dockerfile"
    targets = {services["server"]["build"]["target"], read("compose.gpu.yaml")["services"]["server"]["build"]["target"]}
    assert targets == {*re.findall(r"FROM \S+ AS (serve|gpu)", dockerfile)}
    port = re.findall(r"EXPOSE (\d+)", dockerfile)
    assert services["server"]["ports"] == [f"127.0.0.1:{port[0]}:{port[0]}"]
    (job,) = read("prometheus.yaml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{port[0]}"]}]
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == read("prometheus.yaml")["global"]["scrape_interval"]
    mounts = dict(volume.split(":")[:2][::-1] for volume in services["grafana"]["volumes"])
    (provider,) = read("grafana/provisioning/dashboards/loopwise.yaml")["providers"]
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert DEPLOY / mounts[provider["options"]["path"]] / home.name == FILE
    assert str(home.parent) == provider["options"]["path"]
    assert (DEPLOY / mounts["/etc/grafana/provisioning"] / "dashboards").is_dir()
