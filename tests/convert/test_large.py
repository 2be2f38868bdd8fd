"""Conversion of large models: a plan without values, devices, and the low-rank SVD."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from loopwise.cli import main
from loopwise.convert import relax
from loopwise.model.relaxation import relaxed_matrix
from tests.helpers.convert import refused
from tests.helpers.sparse import save_sparse
from tests.helpers.tiny import save_source

SECONDS, MEBIBYTES = 20, 200  # 2 s and 25 MiB were seen on a loaded machine


def memory(name: str) -> int:
    """KiB of VmRSS (resident now) or VmHWM (at most, since the last reset)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


PLANS = [
    pytest.param(["sizes=20,40,20"], marks=pytest.mark.slow),
    ["method=recursive", "loops=2", "init=average", "lora.rank=64"],
]


@pytest.mark.parametrize("keys", PLANS)
def test_a_dry_run_of_a_70b_model_reads_no_values(keys, capsys, tmp_path):
    source = save_sparse(tmp_path / "source")
    assert sum(file.stat().st_size for file in source.glob("*.safetensors")) > 140e9
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    before, start = memory("VmRSS"), time.monotonic()
    assert main(["convert", str(source), str(tmp_path / "out"), *keys, "--dry-run"]) == 0
    assert time.monotonic() - start < SECONDS
    assert memory("VmHWM") - before < MEBIBYTES * 1024
    assert "parameters 70,553,706,496 -> " in capsys.readouterr().out


def test_a_missing_device_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    keys = ["method=recursive", "loops=2", "lora.rank=4", "device=cuda"]
    line = refused(capsys, tmp_path, save_source(tmp_path / "source"), tmp_path / "out", *keys)
    assert f"device=cuda: torch {torch.__version__} finds no CUDA device here; use device=cpu" in line


@pytest.mark.parametrize("keys", [["sizes=2,2,2"], ["method=recursive", "loops=2", "lora.rank=4", "lora.init=zero"]])
def test_a_device_without_effect_is_refused(keys, capsys, tmp_path):
    line = refused(capsys, tmp_path, "source", tmp_path / "out", *keys, "device=cuda")
    assert "device=cuda has no effect: these tensors are copied" in line


@pytest.mark.parametrize("shape", [(1100, 1500), (1500, 1100)])
def test_the_low_rank_svd_is_torchs(shape):
    """Its error is the full SVD's, its seed alone decides its bits, and torch's own generator is left as it is."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape[0], 40, generator=generator) @ torch.randn(40, shape[1], generator=generator)
    matrix += 3 * torch.randn(shape, generator=generator)
    state = torch.get_rng_state()
    b, a = relax.truncated_svd(matrix, 32, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip((b, a), relax.truncated_svd(matrix, 32, seed=5), strict=True))
    assert not torch.equal(a, relax.truncated_svd(matrix, 32, seed=6)[1])
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    best = (matrix - (u[:, :32] * s[:32]) @ v[:32]).norm().item()
    assert (matrix - b @ a).norm().item() == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_relaxed_matrix_is_the_sum_to_the_bit_and_alone_of_its_size(dtype, transposed):
    """W is stored in bfloat16, as of large models. A converted W and the product stood beside it before."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 4096, generator=generator).bfloat16()
    weight = weight.T if transposed else weight
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((64, 4096), (4096, 64)))
    norms = torch.rand(4096, generator=generator).to(dtype)
    torch.matmul(b, a)  # buffers of the library
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    before = memory("VmRSS")
    got = relaxed_matrix(weight, a, b)
    assert (memory("VmHWM") - before) * 1024 < 2.2 * got.nbytes  # 1.8 were seen, and 3.0 before
    want = weight.to(dtype) + b @ a
    assert torch.equal(got, want)
    scaled = want * (norms / torch.linalg.vector_norm(want, dim=1))[:, None]
    assert torch.equal(relaxed_matrix(weight, a, b, norms), scaled)
