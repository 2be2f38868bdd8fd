"""Verification refuses a wrong tensor and wrong code, down to stated sizes, and passes what rounding alone changes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from loopwise.cli import main
from loopwise.convert import ConvertRecipe, conversion, convert, export, relax
from loopwise.convert.architectures import SUPPORTED
from loopwise.convert.write import write_weights
from loopwise.errors import UserError
from loopwise.recipe import validate
from tests.helpers.convert import RELAXED, source, written
from tests.helpers.faults import FAULTS, changed, configured, one_more, put, read, scaled, with_values
from tests.helpers.tiny import save_source
from tests.helpers.tiny_configs import ARCHITECTURES, UNIFORM


@pytest.fixture(scope="module")
def relaxed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relaxed")
    with written(save_source(folder / "source"), folder / "out", **RELAXED) as made:
        yield made, folder / "out"


def test_what_is_right_is_accepted(relaxed):
    made, out = relaxed
    found = made.verify(out)
    assert found["float64"] < 1e-12 < found["float32"] < 1e-4


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, relaxed):
    made, out = relaxed
    with FAULTS[fault](out), pytest.raises(UserError, match="verification failed"):
        made.verify(out)


@pytest.mark.parametrize(
    ("model_type", "keys", "name", "change"),
    [
        ("llama", {"sizes": [1, 3, 2]}, "injection.weight", one_more),
        ("llama", {"sizes": [1, 3, 2], "state_init": "zeros"}, "injection.weight", one_more),  # times a state of zeros
        ("llama", {"method": "mor", "loops": 2}, "router.networks.0.weight", one_more),
        ("llama", {"method": "recursive", "loops": 2, "init": "random"}, "core.0.mlp.up_proj.weight", one_more),
        ("llama", {"sizes": [1, 3, 2], "lora": {"rank": 2}}, "relaxation.0.mlp.up_proj.lora_B", one_more),
        (
            "llama",
            {**RELAXED, "lora": {"rank": 8, "dora": True}},
            "relaxation.0.mlp.up_proj.dora_magnitude",
            scaled(1e-4),
        ),
        (
            "llama",
            {**RELAXED, "lora": {"rank": 8, "init": "zero"}},
            "relaxation.0.mlp.up_proj.lora_A",
            torch.zeros_like,  # from which nothing is ever learned
        ),
        ("qwen2", {"method": "recursive", "loops": 2}, "core.0.self_attn.q_proj.bias", torch.zeros_like),
        ("mixtral", {"sizes": [1, 3, 2]}, "core.0.mlp.experts.down_proj", one_more),
        ("gpt2", {**RELAXED, "lora": {"rank": 8, "targets": ["o"]}}, "relaxation.0.attn.c_proj.lora_B", scaled(1e-4)),
    ],
)
def test_faults_of_other_methods_and_sources_are_found(model_type, keys, name, change, tmp_path):
    with written(save_source(tmp_path / "source", model_type), tmp_path / "out", **keys) as made:
        made.verify(tmp_path / "out")
        with (
            changed(tmp_path / "out", name, change),
            pytest.raises(UserError, match=f"verification failed: tensor {name}"),
        ):
            made.verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "change", "named"),
    [
        ({"method": "mor", "loops": 2}, with_values("router", alpha=0.9), "router.alpha"),
        ({"method": "mor", "loops": 2}, with_values("router", capacity=[1.0, 0.9]), "router.capacity"),
        ({"sizes": [1, 3, 2], "state_init": "zeros"}, with_values(state_init="input"), "state_init"),
    ],
)
def test_fields_that_the_comparison_replaces_are_read_back(keys, change, named, tmp_path):
    """It runs without the router, and from a state of its own."""
    with (
        written(save_source(tmp_path / "source"), tmp_path / "out", **keys) as made,
        configured(tmp_path / "out", change),
        pytest.raises(UserError, match=rf"failed: {named} of config\.json"),
    ):
        made.verify(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_that_are_rounded_are_checked_too(dtype, tmp_path):
    """A LoRA in 16 bits that is off by one part in 20, at one depth, is refused."""
    with written(save_source(tmp_path / "source"), tmp_path / "out", **RELAXED, dtype=dtype) as made:
        assert made.verify(tmp_path / "out")["float64"] < 1e-12
        for factor in "AB":
            name = f"relaxation.0.self_attn.q_proj.lora_{factor}"
            with changed(tmp_path / "out", name, scaled(0.05)), pytest.raises(UserError, match=name):
                made.verify(tmp_path / "out")


def test_factors_of_wrong_code_are_found(capsys, tmp_path):
    """The code that makes them, that averages, and that reads another layer."""
    folder = save_source(tmp_path / "source")
    argv = ["convert", str(folder), str(tmp_path / "out"), "method=recursive", "loops=2", "init=average", "lora.rank=8"]
    svd = relax.truncated_svd

    def least(change: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.linalg.svd(change, full_matrices=False)[2][-rank:]
        return change @ a.T, a

    def any_rows(change: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.linalg.qr(torch.randn(change.shape[1], rank, generator=torch.Generator().manual_seed(seed))).Q.T
        return change @ a.T, a

    wrong = [
        mock.patch.object(relax, "truncated_svd", least),
        mock.patch.object(relax, "truncated_svd", any_rows),
        mock.patch.object(relax, "truncated_svd", lambda *given: (svd(*given)[0] * 1.0001, svd(*given)[1])),
        mock.patch("loopwise.convert.tensors._mean", lambda weights, names, device: weights.read(names[0])),
    ]
    for fault in wrong:
        with fault:
            assert main(argv) == 2
        line = capsys.readouterr().err
        assert "verification failed: tensor " in line
        assert line.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_faults_of_an_export_are_found(tmp_path):
    convert(
        save_source(tmp_path / "source"), tmp_path / "model", validate(ConvertRecipe, {**RELAXED, "dtype": "bfloat16"})
    )
    found = export.export(tmp_path / "model", tmp_path / "plain", unroll=2)
    assert found is not None
    assert 1e-6 < found["float64"] < 0.1  # merged weights are rounded to bfloat16
    write, name = write_weights, "model.layers.3.mlp.up_proj.weight"

    def damaged(tensors: Any, directory: Path, show_progress: bool) -> None:
        write(tensors, directory, show_progress)
        put(directory, name, one_more(read(directory, name)))

    with mock.patch("loopwise.convert.write.write_weights", damaged), pytest.raises(UserError, match=name):
        export.export(tmp_path / "model", tmp_path / "other", unroll=2)
    product = relax.merged
    with (
        mock.patch.object(relax, "merged", lambda *given: product(*given) * (1 + 1e-6)),
        pytest.raises(UserError, match="both computed in float64"),
    ):
        export.export(tmp_path / "model", tmp_path / "other", unroll=2)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("name", "tensor"), [("olmo", "core.0.mlp.up_proj.weight"), ("mor-token", "router.bias")])
def test_faults_of_an_import_are_found(name, tensor, capsys, tmp_path):
    write = conversion.write_weights

    def damaged(tensors: Any, directory: Path, *more: Any) -> dict[str, float]:
        errors = write(tensors, directory, *more)
        put(directory, tensor, one_more(read(directory, tensor)))
        return errors

    with mock.patch.object(conversion, "write_weights", damaged):
        assert main(["convert", str(source(name, tmp_path / "source")), str(tmp_path / "out")]) == 2
    assert f"verification failed: tensor {tensor}" in capsys.readouterr().err


NOTHING_IN_COMMON = {"jamba", "lfm2_moe", "nemotron_h"}  # their layers have no matrix for a LoRA
ENDS = {"gpt_neox_japanese", "modernbert-decoder"}  # their last, or first, layer has other parameters


def cases() -> list[Any]:
    few = ("llama", 1), ("qwen3_moe", 2)
    every = itertools.product(SUPPORTED, (1, 2, 4))
    return [pytest.param(*case, marks=[] if case in few else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("model_type", "threads"), cases())
def test_rounding_is_no_fault(model_type, threads, tmp_path):
    """With LoRA in each dtype, and bit for bit without, in any number of threads."""
    # An indexer that chooses few keys chooses others once rounded; here it has room for all keys that are compared.
    room: dict[str, Any] = {"index_topk": 64} if "index_topk" in ARCHITECTURES[model_type] else {}
    save_source(tmp_path / "source", model_type, **UNIFORM.get(model_type, {}), **room)
    sharing = "middle-cycle" if model_type in ENDS else "cycle"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in ("float32", "bfloat16", "float16"):
            plain: dict[str, Any] = {"sizes": [1, 3, 2], "dtype": dtype}
            facts = convert(tmp_path / "source", tmp_path / "out", validate(ConvertRecipe, plain), force=True)
            assert facts["max_dlogit_by_dtype"] == {dtype: 0}
            loops = 3 if model_type == "gpt_neo" else 2  # its layers alternate
            recipe = validate(ConvertRecipe, {**RELAXED, "loops": loops, "sharing": sharing, "dtype": dtype})
            if model_type in NOTHING_IN_COMMON:
                with pytest.raises(UserError, match=r"lora: none of the matrices .* is in every layer of the core"):
                    convert(tmp_path / "source", tmp_path / "out", recipe, force=True)
                continue
            facts = convert(tmp_path / "source", tmp_path / "out", recipe, force=True)
            assert facts["max_dlogit"] < 1e-12
            assert facts["max_dlogit_by_dtype"].keys() == {dtype, "float64"}
    finally:
        torch.set_num_threads(before)
