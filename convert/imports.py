"""Import of public recurrent-depth checkpoints into the one model."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..checkpoint import config_fields, read_json, weight_files
from ..errors import UserError
from ..model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from . import reference
from .formats import FORMATS, Format, Imported, Transform
from .recipe import ConvertRecipe
from .source import DTYPES
from .verify import DEPTH, difference, reloaded, sample
from .write import Pending


def is_recurrent(path: Path, recipe: ConvertRecipe) -> bool:
    """Whether `path` holds a public recurrent checkpoint, which is imported. Raises UserError for keys of the recipe
    that say how to make one."""
    kind = config_fields(path)["model_type"]
    if kind not in {known.model_type for known in FORMATS}:
        if recipe.method is None:
            raise UserError(
                f"{path} ({kind}) is no recurrent checkpoint that could be imported, so say how to make one of it: "
                "method=retrofit with sizes=P,C,D or layers.prelude, layers.core, layers.coda; or method=recursive "
                "with loops=B"
            )
        return False
    fitting = {"num_recurrences", "max_recurrences", "state_init", "dtype", "revision", "seed"}
    given = sorted(recipe.model_fields_set - fitting, key=lambda key: (key == "method", key))
    if given:
        raise UserError(f"{path} ({kind}) is a recurrent model already and is imported as it is: leave out {given[0]}")
    return True


def fix_special_tokens(directory: Path, config: Any) -> None:
    """Let generation_config.json end at the tokens of `config`: Ouro's released files name token 0 for all three."""
    file = directory / "generation_config.json"
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    fields = read_json(file) if file.is_file() else {}
    if fields and {fields.get(name) for name in names} <= {0, None}:
        file.write_text(json.dumps({**fields, **{name: getattr(config, name) for name in names}}, indent=2) + "\n")


class RawTensors:
    """The tensors of a checkpoint by their names on disk. Use as a context manager."""

    def __init__(self, path: Path):
        self.files = weight_files(path)
        self._stack = ExitStack()
        handles = [self._stack.enter_context(safe_open(file, framework="pt")) for file in self.files]
        self._where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    def __enter__(self) -> RawTensors:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        return set(self._where)

    def read(self, name: str) -> torch.Tensor:
        return self._where[name].get_tensor(name)

    def shape(self, name: str) -> list[int]:
        return list(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        kind = self._where[name].get_slice(name).get_dtype()
        if kind not in DTYPES:
            raise UserError(f"{name} has type {kind}; convert the model to {', '.join(DTYPES)} first")
        return DTYPES[kind]


def plan_import(
    kind: Format, fields: dict[str, Any], raw: RawTensors, recipe: ConvertRecipe
) -> tuple[Any, Imported, list[Pending]]:
    """The config of the imported model, where its tensors come from, and these, to be written.

    Raises UserError for a config without what the format needs, and for missing or unknown tensors.
    """
    try:
        imported = kind.read(fields, raw.names())
        options = {"num_recurrences": recipe.num_recurrences, "max_recurrences": recipe.max_recurrences}
        options |= {"state_init": recipe.state_init, "state_seed": recipe.seed}
        chosen = {**imported.fields, **{key: value for key, value in options.items() if value is not None}}
        config: Any = RecurrentDepthConfig(**chosen)
    except KeyError as error:
        raise UserError(f"config.json of a {kind.name} checkpoint lacks {error.args[0]!r}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    with torch.device("meta"):
        expected = RecurrentDepthForCausalLM(config).state_dict()
    sources = {name for name, _ in imported.tensors.values()}
    if missing := sorted(sources - raw.names()):
        raise UserError(f"a {kind.name} checkpoint has a tensor {missing[0]}, and this one lacks it")
    if unknown := sorted(raw.names() - sources - imported.ignored):
        raise UserError(f"tensor {unknown[0]} is not one of a {kind.name} checkpoint; nothing of it could be kept")
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
    pending = [
        Pending(
            name, dtype or raw.dtype(source), list(expected[name].shape), partial(_make, raw, source, change), source
        )
        for name, (source, change) in imported.tensors.items()
    ]
    config.dtype = dtype or raw.dtype(next(name for name, _ in imported.tensors.values() if "norm" not in name))
    config.architectures = [RecurrentDepthForCausalLM.__name__]
    return config, imported, pending


def _make(raw: RawTensors, source: str, change: Transform) -> torch.Tensor:
    return change(raw.read(source))


def verify_import(
    directory: Path, kind: Format, fields: dict[str, Any], raw: RawTensors, config: Any, dtype: torch.dtype | None
) -> float:
    """Largest difference between the logits of the written model, reloaded, and of the format's own formulas on the
    checkpoint's own tensors, in float32, at one recurrence and at the model's R (at most DEPTH), from a random state.

    Raises UserError above the tolerance.
    """
    ids, _ = sample(config, 0)
    ids = ids[:, :16]
    state = torch.randn(*ids.shape, config.hidden_size, generator=torch.Generator().manual_seed(0)) * 0.1
    state = state if config.injection != "none" else None

    def read(name: str) -> torch.Tensor:
        tensor = raw.read(name)
        return (tensor.to(dtype) if dtype else tensor).float()

    worst = 0.0
    with reloaded(directory, torch.float32) as (model, _), torch.no_grad():
        for depth in sorted({1, min(config.num_recurrences, DEPTH)}):
            want = reference.logits(kind.name, config.source_config, fields, read, ids, depth, state)
            got = model(ids, num_recurrences=depth, initial_state=state, use_cache=False).logits
            what = f"at {depth} recurrences the imported model"
            worst = max(worst, difference(got, want, torch.ones_like(ids), what))
    return worst
