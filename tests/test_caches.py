"""Caches of compiled code: in folders that no other user can write, or refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loopwise.caches import FOLDERS, use_private_caches
from loopwise.errors import UserError


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    for name in (*FOLDERS, "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_they_are_private(home, monkeypatch):
    before = os.umask(0)
    try:
        use_private_caches()
        monkeypatch.setenv("XDG_CACHE_HOME", str(home / "other"))
        named = {name: Path(os.environ[name]) for name in FOLDERS}
        monkeypatch.setenv("TRITON_CACHE_DIR", "")
        use_private_caches()
    finally:
        os.umask(before)
    assert named["VLLM_CACHE_ROOT"] == home / ".cache/loopwise/vllm"
    assert Path(os.environ["TRITON_CACHE_DIR"]) == home / "other/loopwise/triton"
    assert Path(os.environ["VLLM_CACHE_ROOT"]) == named["VLLM_CACHE_ROOT"]
    for folder in (*named.values(), home / ".cache", home / ".cache/loopwise", home / "other/loopwise/triton"):
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to others")
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("fault", ["theirs", "open", "replaceable", "a link"])
def test_folders_that_others_can_change_are_refused(name, fault, home, monkeypatch):
    folder = home / "outer" / "inner"
    folder.mkdir(parents=True, mode=0o700)
    monkeypatch.setenv(name, str(folder))
    use_private_caches()
    monkeypatch.setenv(name, str(folder))
    if fault == "theirs":
        os.chown(folder, 12345, 12345)
    elif fault == "open":
        folder.chmod(0o777)
    elif fault == "replaceable":
        folder.parent.chmod(0o777)
    else:
        target = home / "target"
        target.mkdir()
        os.chown(target, 12345, 12345)
        folder.rmdir()
        folder.symlink_to(target)
    with pytest.raises(UserError, match="another user can change it") as error:
        use_private_caches()
    assert name in str(error.value)
    folder.parent.chmod(0o1777)  # as /tmp: names in it are safe there
    if fault == "replaceable":
        use_private_caches()


def test_commands_have_them_and_help_makes_none(home):
    program = "import os, sys; from loopwise.cli import main; main(sys.argv[1:]); print(os.environ['VLLM_CACHE_ROOT'])"

    def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)

    assert ran("serve", "nowhere").stdout.splitlines() == [str(home / ".cache/loopwise/vllm")]
    assert (home / ".cache/loopwise/vllm").is_dir()
    (home / ".cache/loopwise").rename(home / "away")
    ran("serve", "--help")
    assert not (home / ".cache/loopwise").exists()


def test_without_a_place_for_them_a_temporary_one_goes_with_the_process(home, tmp_path):
    """No HOME that can be written, as in a container."""
    (home / ".cache").write_text("no folder")
    program = "from loopwise.caches import *; use_private_caches(); print(os.environ['TRITON_CACHE_DIR'])"
    place = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=place, timeout=60)
    folder = Path(done.stdout.strip())
    assert folder.parent.parent == tmp_path, done.stderr
    assert not folder.exists()
    place["TMPDIR"] = "/dev/null"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=place, timeout=60)
    assert done.returncode == 0, done.stderr
