"""An OUT that is what a command would make needs no second time."""

from __future__ import annotations

import os
import time

from loopwise.convert import ConvertRecipe, convert
from loopwise.convert.finished import is_done
from loopwise.recipe import validate
from tests.helpers.tiny import save_source


def test_a_hard_link_to_the_weights_changes_nothing(tmp_path):
    """`calibrate` makes one, and st_ctime with it is newer. Other files, and other weights, count as before."""
    source, out = save_source(tmp_path / "source"), tmp_path / "out"
    convert(source, out, validate(ConvertRecipe, {"sizes": [1, 2, 1]}))

    def done() -> bool:
        return is_done(out, str(source), source, {}, check=False)

    assert done()
    time.sleep(0.02)  # the clock of a file system has steps
    os.link(source / "model.safetensors", tmp_path / "link.safetensors")
    assert done()
    content = bytearray((source / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (source / "model.safetensors").write_bytes(content)
    assert not done()
    content[-1] ^= 1
    (source / "model.safetensors").write_bytes(content)
    assert done()
    (source / "config.json").touch()
    assert not done()
