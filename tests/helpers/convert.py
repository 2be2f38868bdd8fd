"""Conversions for tests: run, imported from golden files, refused, and written but not verified yet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loopwise.cli import main
from loopwise.convert import ConvertRecipe, convert
from loopwise.convert.convert_checkpoint import RecipeConversion, open_conversion
from loopwise.recipe import validate
from tests.helpers.tiny import VOCAB

GOLDEN = Path(__file__).parent.parent / "convert" / "golden"  # checkpoints of public formats, and their logits
EVERY_LAYER = {"method": "retrofit", "sizes": [1, 3, 2], "injection": "none", "num_recurrences": 3}


def run(source: Path, out: Path, **keys: Any) -> Any:
    """Convert and load the result."""
    convert(source, out, validate(ConvertRecipe, keys))
    return AutoModelForCausalLM.from_pretrained(out).eval()


def tokens(padded: bool = True) -> dict[str, torch.Tensor]:
    """Two sequences of 20 random ids and their mask; the first is padded on the left by 7."""
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


def source(name: str, folder: Path) -> Path:
    """A copy of the golden checkpoint `name` at `folder`."""
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name / file, folder)
    return folder


def change_fields(folder: Path, **fields: Any) -> None:
    """Replace fields of the config.json in `folder`."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def shard(folder: Path, tensors: dict[str, torch.Tensor], count: int) -> None:
    """Replace model.safetensors in `folder` by `count` files of `tensors` and their index."""
    (folder / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for n in range(count):
        file = f"model-{n + 1:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in sorted(tensors)[n::count]}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(sorted(tensors)[n::count], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def expected(name: str) -> dict[str, torch.Tensor]:
    """The inputs and outputs of the authors' own code for the golden checkpoint `name`."""
    return load_file(GOLDEN / name / "expected.safetensors")


def golden_formats() -> dict[str, str]:
    """Golden folder -> the name of its format, which stands in the metadata of expected.safetensors."""
    return {folder: facts["format"] for folder, facts in _golden_facts().items()}


def sizes(folder: str) -> tuple[str, str]:
    """The names of two fields in a golden folder's config.json: the width of its MLP, and its vocabulary.

    They are Llama's, if the metadata of expected.safetensors has no others in `sizes`; a name within another field is
    FIELD.NAME.
    """
    width, vocabulary = _golden_facts()[folder].get("sizes", "intermediate_size,vocab_size").split(",")
    return width, vocabulary


def _golden_facts() -> dict[str, dict[str, str]]:
    found = {}
    for file in sorted(GOLDEN.glob("*/expected.safetensors")):
        with safe_open(file, "pt") as stored:
            found[file.parent.name] = stored.metadata()
    return found


def refused(capsys, folder: Path, *argv: object) -> str:
    """Run convert, which must fail with one line on stderr and leave `folder` as it was; the line is returned."""
    before = sorted(folder.rglob("*"))
    assert main(["convert", *map(str, argv)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("loopwise: error: ")
    assert printed.out == ""
    assert sorted(folder.rglob("*")) == before
    return printed.err


def import_refused(capsys, folder: Path, out: Path, *keys: str) -> str:
    """Run convert, which must fail with one line on stderr and write nothing; the line is returned."""
    assert main(["convert", str(folder), str(out), *keys]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert not out.exists()
    return line


RELAXED = {"method": "recursive", "loops": 2, "init": "average", "lora": {"rank": 8}}


@contextmanager
def written(source: Path, out: Path, **keys: Any) -> Iterator[RecipeConversion]:
    """A conversion that was written to `out` and is still to be verified."""
    with open_conversion(source, validate(ConvertRecipe, keys)) as conversion:
        out.mkdir()
        conversion.write(out, tokenizer=None, show_progress=False)
        yield conversion
