"""The main job without what only Linux has: convert, train, eval and generate also run on macOS."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.tiny import save_source

# In a process of its own, for good: modules that are not installed, and the standard library's names for Linux alone.
PROGRAM = """
import os, shlex, signal, socket, sys
from importlib.machinery import PathFinder

absent = sys.argv[1].split()


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
LINUX = {
    os: "memfd_create sched_getaffinity sched_setaffinity posix_fadvise posix_fallocate pidfd_open eventfd splice "
    "copy_file_range O_TMPFILE O_DIRECT",
    signal: "sigtimedwait sigwaitinfo SIGRTMIN SIGRTMAX SIGPOLL SIGSTKFLT",
}
for module, names in LINUX.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)

from loopwise.cli import main

for line in sys.argv[2:]:
    assert main(shlex.split(line)) == 0, line
"""


def run(cwd, absent: str, *lines: str) -> str:
    command = [sys.executable, "-c", PROGRAM, absent, *lines]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("portable")
    save_source(folder / "source")
    (folder / "text.txt").write_text("the core runs again while depth grows with every pass\n\n" * 200)
    return folder


CONVERT = "convert source {out} sizes=2,2,2 num_recurrences=2"
EVAL = "eval {out} data=text.txt sequence_length=32 num_recurrences=1,2"
GENERATE = "generate {out} prompt=the max_tokens=4"
# Of the extras [serve] and [serve-cpu], and those of the others' packages that are for Linux alone.
LINUX_ALONE = "vllm triton uvloop deepspeed"


@pytest.mark.xdist_group("portable")
def test_the_main_job_without_vllm_and_without_linux(folder):
    train = "train one two data.train=text.txt steps=1 data.sequence_length=32 batch_size=2"
    lines = [CONVERT.format(out="one"), train, EVAL.format(out="two"), GENERATE.format(out="two")]
    assert "perplexity" in run(folder, LINUX_ALONE, *lines)
    assert (folder / "two/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.xdist_group("portable")
def test_without_any_extra(folder):
    """Commands that need no extra run without the packages of all extras."""
    extras = f"{LINUX_ALONE} accelerate datasets peft lm_eval openai"
    lines = [CONVERT.format(out="bare"), "inspect bare", EVAL.format(out="bare"), GENERATE.format(out="bare")]
    assert "perplexity" in run(folder, extras, *lines)
