"""The figures of several benchmarks, and `bench/gpu.sh`, whose every line runs on a CPU with --tiny."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.figures import add, read, run, table
from tests.helpers.repository import ROOT

SCRIPT = """
import sys, time
from bench.figures import add
add("speed", 1.5, "x", spread="1.4 to 1.6")
{}
"""


def measured(file: Path, name: str, end: str, seconds: float = 60) -> bool:
    return run(file, name, seconds, [sys.executable, "-c", SCRIPT.format(end)])


def test_what_is_measured_stays_whatever_comes_after(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "figures.jsonl"
    assert measured(file, "whole", "")
    assert not measured(file, "failed", "print('warming up'); sys.exit('no kernels for this device')")
    assert not measured(file, "slow", "time.sleep(60)", seconds=3)
    assert not measured(file, "late", "", seconds=0)
    assert [(line["benchmark"], line["what"]) for line in read(file)] == [
        ("whole", "speed"),
        ("whole", "time"),
        ("failed", "speed"),
        ("failed", "not whole"),
        ("slow", "speed"),
        ("slow", "not whole"),
        ("late", "not whole"),
    ]
    text = table(read(file))
    assert "| whole | speed | 1.5 x | spread 1.4 to 1.6 |" in text
    assert "| failed | not whole | exit code 1: no kernels for this device |" in text
    assert "| slow | not whole | killed after 3 s |" in text
    assert "| late | not whole | no time was left |" in text


def test_a_benchmark_by_itself_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    add("speed", 1.0)
    assert list(tmp_path.iterdir()) == []


def gpu(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [str(ROOT / "bench/gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=900)


def test_parts_are_checked_first(tmp_path):
    done = gpu(tmp_path / "out", "exact", "engines")
    assert (done.returncode, done.stderr) == (2, "part engines: one of exact, engine, served\n")
    assert gpu().returncode == 2


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
@pytest.mark.parametrize("part", ["exact", "engine", "served"])
def test_every_line_runs(part, tmp_path):
    done = gpu("--tiny", tmp_path, part)
    assert done.returncode == 0, done.stderr
    lines = read(tmp_path / "figures.jsonl")
    assert lines[0]["benchmark"] == "device"
    assert [line["value"] for line in lines if line["what"] == "not whole"] == []
    assert len({line["benchmark"] for line in lines}) >= 3
    assert (tmp_path / "figures.md").read_text().count("\n") > len(lines)
