"""Writes the tables of docs/reference/sources.md: `python docs/convert_table.py`, from the root of the repository.

With `lists`, those alone that need no conversion; with names, the rows of these architectures alone.
"""

from __future__ import annotations

import re
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reference/sources.md"
sys.path.insert(0, str(ROOT))

from loopwise.convert import ConvertRecipe, convert  # noqa: E402
from loopwise.convert.architectures import CANNOT_BY_REASON, MULTIMODAL, NOT_YET_BY_REASON, SUPPORTED  # noqa: E402
from loopwise.convert.relax import projections  # noqa: E402
from loopwise.convert.source_config import empty_model  # noqa: E402
from loopwise.errors import UserError  # noqa: E402
from loopwise.model.source_layers import layer_list_name  # noqa: E402
from loopwise.recipe import validate  # noqa: E402
from loopwise.serve.api.architectures import ARCHITECTURES, NOT_SERVED_BY_REASON  # noqa: E402
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
    write("served", served())
    write("refused", refused())
    write("multimodal", textwrap.wrap(f"{', '.join(MULTIMODAL)}.", 120, break_on_hyphens=False))
    if sys.argv[1:] != ["lists"]:
        write("table", methods(sys.argv[1:] or SUPPORTED))


def write(name: str, lines: list[str]) -> None:
    """Replace the part `name` of the page by `lines`."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(f"<!-- {name} -->")
    after = rest.partition(f"<!-- /{name} -->")[2]
    table = "\n".join(lines).rstrip()
    PAGE.write_text(f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->{after}", encoding="utf-8")


def served() -> list[str]:
    """Source -> convert, transformers, lanes, fixed: the sources that are alike in a line."""
    groups = {"": [name for name in SUPPORTED if name in ARCHITECTURES]}
    groups |= {reason: names.split() for reason, names in NOT_SERVED_BY_REASON.items()}
    lines = ["| source | convert | transformers | lanes | fixed |", "|---|---|---|---|---|"]
    for reason, names in groups.items():
        lines.append(f"| {', '.join(names)} | yes | yes | {' | '.join([f'no: {reason}' if reason else 'yes'] * 2)} |")
    return lines


def refused() -> list[str]:
    """The architectures of transformers that are not supported, and why."""
    lines = ["| architecture | | why |", "|---|---|---|"]
    for kind, reasons in (("not yet", NOT_YET_BY_REASON), ("cannot", CANNOT_BY_REASON)):
        lines += [f"| {', '.join(names.split())} | {kind} | {reason} |" for reason, names in reasons.items()]
    return lines


def methods(names: list[str]) -> list[str]:
    """Every architecture with every method. The rows of others than `names` are the page's."""
    rows = written_before() if names is not SUPPORTED else {}
    for architecture in names:
        with tempfile.TemporaryDirectory() as folder:
            source = save_source(Path(folder) / "source", architecture)
            rows[architecture] = [cell(source, Path(folder) / "out", keys) for keys in COLUMNS.values()]
        print(architecture, *rows[architecture], sep=" | ", flush=True)
    rows = {name: rows[name] for name in SUPPORTED if name in rows}
    reasons = list(dict.fromkeys(found for cells in rows.values() for found in cells if found not in "=~"))
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, cells in rows.items():
        shown = [found if found in "=~" else f"({reasons.index(found) + 1})" for found in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    lines.append("")
    for n, reason in enumerate(reasons):
        lines += textwrap.wrap(f"{n + 1}. {reason}", 120, subsequent_indent="   ")
    return lines


def written_before() -> dict[str, list[str]]:
    """The cells of the page by architecture, with reasons in words."""
    text = PAGE.read_text(encoding="utf-8").partition("<!-- table -->")[2].partition("<!-- /table -->")[0]
    found = dict(re.findall(r"(?ms)^(\d+)\. (.*?)(?=^\d+\. |\Z)", text))
    reasons = {f"({n})": re.sub(r"\s+", " ", reason).strip() for n, reason in found.items()}
    rows = (line.strip("|").split(" | ") for line in text.splitlines() if re.match(r"\| [a-z]", line))
    return {name.strip(): [reasons.get(one.strip(), one.strip()) for one in cells] for name, *cells in rows}


def cell(source: Path, out: Path, keys: dict[str, Any]) -> str:
    """= or ~, or the reason why not."""
    if "lora" in keys:
        keys = {**keys, "lora": {"rank": full_rank(source) or 1}}
    try:
        facts = convert(source, out, validate(ConvertRecipe, keys), force=True)
    except UserError as error:
        return in_general(str(error))
    worst = facts["max_dlogit"]
    if "lora" in keys or "method" not in keys:  # the conversion itself compared less than this
        worst = against_source(source, out, keys)
    if worst > 1e-4 and max(facts["lora_error"].values()) > 1e-4:
        return "the matrices of a target share a rank, and in latent attention (MLA) their full ranks differ"
    if worst > 1e-4:
        return "matrices other than q, k, v, o, gate, up and down (experts, for one) have no LoRA and stay tied"
    return "=" if worst == 0 else "~"


def in_general(error: str) -> str:
    """`error` without the layers and loops of this source."""
    return re.sub(r"^.* (?=ties layers of)", "", re.sub(r" \([^()]*\)", "", error))


def full_rank(source: Path) -> dict[str, int]:
    """The greatest rank that each projection can have, of those that all layers have."""
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = empty_model(config)
    layers = [projections(layer) for layer in model.get_submodule(layer_list_name(model, config.num_hidden_layers))]
    ranks: dict[str, int] = {}
    for name in set(layers[0]).intersection(*layers):
        for module, targets in (layer[name] for layer in layers):
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
