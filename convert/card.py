"""The model card that every output carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..card import as_front, metadata
from ..model import RecurrentDepthConfig
from .agreement import in_words
from .inspection import describe


def model_card(facts: dict[str, Any], config: RecurrentDepthConfig, path: Path, directory: Path) -> str:
    """README.md of the checkpoint converted into `directory`, from the facts of loopwise.json and the config.

    path: the directory of the source.
    """
    source = facts["source"]["id"]
    plan, size = facts["plan"], facts["parameters"]
    found = facts["max_dlogit_by_dtype"]
    against = f"the formulas of {facts['format']}" if "format" in facts else "the source's layers"
    checked = (
        f"Verified after writing, against {against}: {in_words(found)}."
        if found
        else "**Not verified**: converted with --no-verify."
    )
    front = metadata(source, path, directory, ["recurrent-depth", "loopwise"])
    return f"""{as_front(front)}# Recurrent-depth {config.source_config.model_type}

Converted from `{source}` by loopwise {facts["loopwise"]}. {checked}

| part | source layers |
|---|---|
| prelude | {plan["parents"]["prelude"]} |
| core, runs {plan["num_recurrences"]} times by default | {plan["parents"]["core"]} |
| coda | {plan["parents"]["coda"]} |
| dropped | {plan["dropped"]} |

Injection `{plan["injection"]}`, initial state `{plan["state_init"]}`.{_norm(config)}{_damping(config)}{_router(config)}
{size["unique"]:,} parameters; the source has {size["source"]:,}. Recipe, versions and hashes are in `loopwise.json`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
out = model.generate(**tokenizer("Hello", return_tensors="pt"), num_recurrences={plan["num_recurrences"]})
```
"""


def export_card(facts: dict[str, Any], config: PreTrainedConfig, path: Path, directory: Path) -> str:
    """README.md of the plain model exported into `directory` from the checkpoint in the directory `path`."""
    source, found = facts["source"]["id"], facts["max_dlogit_by_dtype"]
    checked = f"compared with it: {in_words(found)}" if found else "**not verified**"
    return f"""{as_front(metadata(source, path, directory, ["loopwise"]))}# {config.model_type}, unrolled

`{source}`, a recurrent-depth model, at {facts["unroll"]} recurrences, whose layers are written out: a plain model for
any engine. Written by loopwise {facts["loopwise"]}, {checked}.
"""


def _norm(config: RecurrentDepthConfig) -> str:
    """A sentence on the recurrence norm; "" for a model without any."""
    norm = config.recurrence_norm
    return "" if norm == "none" else f" Norm of recurrences: `{norm}`."


def _damping(config: RecurrentDepthConfig) -> str:
    """A sentence on the damping; "" for a model without any."""
    damping = config.recurrence_damping
    return "" if damping == 1 else f" A recurrence makes a share of its step: `recurrence_damping={damping}`."


def _router(config: RecurrentDepthConfig) -> str:
    """A sentence on the router; "" for a model without one."""
    return f" Router: {describe(config.router)}." if config.router else ""
