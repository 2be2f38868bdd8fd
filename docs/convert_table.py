"""Writes the table of docs/reference/sources.md: `python docs/convert_table.py`, from the root of the repository."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from loopwise.convert import ConvertRecipe, convert  # noqa: E402
from loopwise.convert.architectures import SUPPORTED  # noqa: E402
from loopwise.convert.relax import projections  # noqa: E402
from loopwise.convert.source_config import empty_model  # noqa: E402
from loopwise.errors import UserError  # noqa: E402
from loopwise.model.source_layers import layer_list_name  # noqa: E402
from loopwise.recipe import validate  # noqa: E402
from tests.helpers.tiny import VOCAB, load_source, save_source  # noqa: E402

SIZES = {"sizes": [1, 3, 2]}
TIED = {"method": "recursive", "loops": 2}
COLUMNS: dict[str, dict[str, Any]] = {
    "retrofit none": {**SIZES, "injection": "none"},
    "linear": SIZES,
    "gated": {**SIZES, "injection": "gated"},
    "decayed": {**SIZES, "injection": "decayed"},
    "recursive cycle": TIED,
    "sequence": {**TIED, "sharing": "sequence"},
    "middle-cycle": {**TIED, "sharing": "middle-cycle"},
    "average": {**TIED, "init": "average"},
    "relaxed": {**TIED, "lora": True},
    "mor expert": {"method": "mor", "loops": 2, "sharing": "cycle"},
    "token": {"method": "mor", "loops": 2, "sharing": "cycle", "router": {"kind": "token"}},
    "universal": {"method": "universal"},
}


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    reasons: list[str] = []
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for architecture in SUPPORTED:
        with tempfile.TemporaryDirectory() as folder:
            source = save_source(Path(folder) / "source", architecture)
            cells = [cell(source, Path(folder) / "out", keys, reasons) for keys in COLUMNS.values()]
        lines.append(f"| {architecture} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    lines += ["", *(f"{n + 1}. {reason}" for n, reason in enumerate(reasons))]
    page = ROOT / "docs/reference/sources.md"
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- table -->")
    after = rest.partition("<!-- /table -->")[2]
    table = "\n".join(lines).rstrip()
    table = "\n".join(lines).rstrip()
    page.write_text(f"{before}<!-- table -->\n{table}\n<!-- /table -->{after}", encoding="utf-8")


def cell(source: Path, out: Path, keys: dict[str, Any], reasons: list[str]) -> str:
    """= or ~, or the number of the reason why not."""
    if "lora" in keys:
        keys = {**keys, "lora": {"rank": full_rank(source)}}
    try:
        facts = convert(source, out, validate(ConvertRecipe, keys), force=True)
    except UserError as error:
        return noted(str(error), reasons)
    worst = facts["max_dlogit"]
    if "lora" in keys or "method" not in keys:  # the conversion itself compared less than this
        worst = against_source(source, out, keys)
    if worst > 1e-4:
        return noted(
            "matrices other than q, k, v, o, gate, up and down (experts, for one) have no LoRA and stay tied", reasons
        )
    return "=" if worst == 0 else "~"


def noted(reason: str, reasons: list[str]) -> str:
    if reason not in reasons:
        reasons.append(reason)
    return f"({reasons.index(reason) + 1})"


def full_rank(source: Path) -> dict[str, int]:
    """The greatest rank that each projection of a layer can have."""
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = empty_model(config)
    layers = model.get_submodule(layer_list_name(model, config.num_hidden_layers))
    ranks: dict[str, int] = {}
    for module, targets in projections(layers[0]).values():
        for target in targets:
            most = min(module.weight.shape)
            ranks[target] = min(most, ranks.get(target, most))
    return ranks


def against_source(source: Path, out: Path, keys: dict[str, Any]) -> float:
    """Largest difference of the logits at the depth at which the model is the source."""
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(5))
    depth = keys.get("loops", 1)
    models = [load_source(source), AutoModelForCausalLM.from_pretrained(out).eval()]
    with torch.no_grad():
        want, got = models[0](ids).logits, models[1](ids, num_recurrences=depth).logits
    return (want - got).abs().max().item()


if __name__ == "__main__":
    main()
