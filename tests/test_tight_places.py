"""Commands in a container without a home, a place for temporary files, a compiler or UTF-8, and with a full log."""

from __future__ import annotations

import sys

import pytest

from tests.helpers.namespace import LOOPWISE, run
from tests.helpers.tiny import save_source

# A read-only /tmp, and a PATH with what vLLM needs alone: no compiler.
PLACE = """
    mkdir -p bin
    for name in lscpu sh cp; do ln -sf "$(command -v $name)" bin/; done
    mount --bind "$PWD" /mnt && mount -t tmpfs -o ro none /tmp && cd /mnt || exit 9
    unset LANG XDG_CACHE_HOME TMPDIR TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR VLLM_CACHE_ROOT
    export PATH=/mnt/bin LC_ALL=C
"""
HOMES = {"read-only": "export HOME=/proc/sys", "none": "unset HOME"}
COMMANDS = {
    "convert": "convert source out sizes=2,2,2 num_recurrences=2",
    "train": "train out trained data.train=text.txt steps=1 data.sequence_length=32 batch_size=2",
    "generate": "generate trained prompt=the max_tokens=2",
}


@pytest.mark.slow
@pytest.mark.parametrize("home", HOMES)
def test_the_main_job_works(home, tmp_path):
    """With stderr on a full disk, too: exit code 0 each time, and refusals have exit code 2."""
    save_source(tmp_path / "source")
    (tmp_path / "text.txt").write_text("the core runs again while depth grows with every pass\n\n" * 100)
    script = PLACE + HOMES[home] + "\n"
    for name, arguments in COMMANDS.items():
        error = "/dev/full" if name != "train" else "/dev/stderr"
        script += f"{LOOPWISE} {arguments} 2>{error}; echo {name} $?\n"
    script += f"{LOOPWISE} convert nowhere out2 2>/dev/full; echo refused $?\n"
    done = run(script, tmp_path, PYTHONPATH=":".join(filter(None, sys.path)))
    for name in COMMANDS:
        assert f"{name} 0" in done.stdout.splitlines(), done.stdout + done.stderr
    assert "refused 2" in done.stdout.splitlines()


def test_a_full_log_ends_no_command(tmp_path):
    """Lines on stderr are lost; the result is not."""
    done = run(f"{LOOPWISE} inspect nowhere 2>/dev/full; echo $?; {LOOPWISE} --version 2>/dev/full", tmp_path)
    assert done.stdout.splitlines()[0] == "2"
    assert done.stdout.splitlines()[1].startswith("loopwise ")
