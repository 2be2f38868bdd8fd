"""An OUT that is what a command would make needs no second time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from loopwise.convert import ConvertRecipe, convert
from loopwise.convert.finished import check_done
from loopwise.errors import UserError
from loopwise.recipe import validate
from tests.helpers.tiny import save_source


def test_a_hard_link_to_the_weights_changes_nothing(tmp_path):
    """`calibrate` makes one, and st_ctime with it is newer. Other files, and other weights, count as before."""
    source, out = save_source(tmp_path / "source"), tmp_path / "out"
    convert(source, out, validate(ConvertRecipe, {"sizes": [1, 2, 1]}))

    def done() -> bool:
        try:
            check_done(out, str(source), source, {}, check=False)
        except UserError:
            return False
        return True

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


def test_a_repeat_says_why_it_is_not_done(tmp_path, monkeypatch):
    """Another spelling of the source is the same one; a GGUF file without an ending is known by its content."""
    source, out = save_source(tmp_path / "source"), tmp_path / "out"
    convert(source, out, validate(ConvertRecipe, {"sizes": [1, 2, 1]}))
    monkeypatch.chdir(tmp_path)
    recipe = json.loads((out / "loopwise.json").read_text())["recipe"]
    for name in (f"{source}/", "source", "./source", f"{tmp_path}/../{tmp_path.name}/source"):
        check_done(out, name, source, {"recipe": recipe}, check=True)

    def reason(name: str = "source", **changed: object) -> str:
        with pytest.raises(UserError, match="is not empty: ") as error:
            check_done(out, name, Path(name), {"recipe": {**recipe, **changed}}, check=True)
        return str(error.value)

    assert f"it was made from {source}, not from other; choose another directory" in reason("other")
    assert "recipe.sizes was [1, 2, 1], now [2, 2, 1];" in reason(sizes=[2, 2, 1])
    (source / "added.json").write_text("{}")
    assert "source/added.json is newer;" in reason()
    (source / "added.json").unlink()
    data = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(data[:-1])
    assert "model.safetensors in it is not as it was written;" in reason()
    (out / "model.safetensors").write_bytes(data)
    (source / "model.safetensors").rename(tmp_path / "blob")
    assert "model.safetensors cannot be read: No such file" in reason()
    record = json.loads((out / "loopwise.json").read_text())
    record["source"] = {**record["source"], "id": "blob", "revision": "a" * 40}
    (out / "loopwise.json").write_text(json.dumps(record))
    check_done(out, "./blob", Path("blob"), {}, check=True)
    at = tmp_path / "models--me--it" / "snapshots" / ("b" * 40)
    with pytest.raises(UserError, match=f"was at commit {'a' * 40}, now {'b' * 40} "):
        check_done(out, "blob", at, {}, check=True)
