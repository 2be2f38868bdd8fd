"""Import of public recurrent-depth checkpoints into the one model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import config_fields, read_json
from ..errors import UserError, reason
from ..gguf_source import find_gguf
from ..model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from . import mor, reference
from .agreement import WAY_OUT, Logits, in_double
from .architectures import SUPPORTED
from .double import Double
from .expected import check_config, check_equal
from .formats import FORMATS, Format
from .raw import Imported, RawTensors, Transform
from .recipe import ConvertRecipe
from .verify import DEPTH, reloaded, sample
from .write import Pending


def is_recurrent(path: Path, recipe: ConvertRecipe) -> bool:
    """Whether `path` holds a public recurrent checkpoint, which is imported. Raises UserError for keys of the recipe
    that say how to make one."""
    fields = config_fields(path)
    kind = fields["model_type"]
    formats = [known for known in FORMATS if known.model_type == kind and not find_gguf(path)]
    if formats and kind in SUPPORTED:  # a plain checkpoint, unless its tensors say otherwise
        with RawTensors(path) as raw:
            formats = [known for known in formats if known.mismatch(fields, raw.names()) is None]
    if not formats:
        if recipe.method is None:
            raise UserError(
                f"{path} ({kind}) is no recurrent checkpoint that could be imported, so say how to make one of it: "
                "method=retrofit with sizes=P,C,D or layers.prelude, layers.core, layers.coda; or method=recursive "
                "with loops=B"
            )
        return False
    fitting = {"num_recurrences", "max_recurrences", "state_init", "dtype", "revision", "seed", "kv_policy", "exit"}
    if kind in SUPPORTED:
        fitting = {"router", "dtype", "revision"}
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


def plan_import(
    kind: Format, fields: dict[str, Any], raw: RawTensors, recipe: ConvertRecipe
) -> tuple[Any, Imported, list[Pending]]:
    """The config of the imported model, where its tensors come from, and these, to be written.

    Raises UserError for a config without what the format needs, and for missing or unknown tensors.
    """
    try:
        imported = kind.read(fields, raw)
        options: dict[str, Any] = {"num_recurrences": recipe.num_recurrences, "max_recurrences": recipe.max_recurrences}
        options |= {"state_init": recipe.state_init, "state_seed": recipe.seed, "kv_policy": recipe.kv_policy}
        options["exit"] = recipe.exit.model_dump(exclude_none=True) if recipe.exit else None
        chosen = {**imported.fields, **{key: value for key, value in options.items() if value is not None}}
        if recipe.router:
            chosen["router"] = _routing(imported.fields["router"], recipe.router.model_dump(exclude_none=True))
        config: Any = RecurrentDepthConfig(**chosen)
        with torch.device("meta"):
            expected = RecurrentDepthForCausalLM(config).state_dict()
    except KeyError as error:
        raise UserError(f"config.json of a {kind.name} checkpoint lacks {error.args[0]!r}") from None
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    except Exception as error:  # transformers and torch share no base class for what they find wrong with a config
        raise UserError(f"config.json: no {kind.name} model can be built from it ({reason(error)})") from None
    sources = {name for names, _ in imported.tensors.values() for name in names}
    if missing := sorted(sources - raw.names()):
        raise UserError(f"a {kind.name} checkpoint has a tensor {missing[0]}, and this one lacks it")
    if unknown := sorted(raw.names() - sources - imported.ignored):
        raise UserError(f"tensor {unknown[0]} is not one of a {kind.name} checkpoint; nothing of it could be kept")
    for name, (sources, change) in imported.tensors.items():
        _check_shape(name, list(expected[name].shape), {source: raw.shape(source) for source in sources}, change)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
    config.dtype = dtype or raw.dtype(next(iter(imported.tensors.values()))[0][0])
    pending = [
        Pending(
            name,
            dtype or (raw.dtype(sources[0]) if sources else config.dtype),
            list(expected[name].shape),
            partial(_make, raw, sources, change),
            ", ".join(sources),
        )
        for name, (sources, change) in imported.tensors.items()
    ]
    config.architectures = [RecurrentDepthForCausalLM.__name__]
    return config, imported, pending


def _check_shape(name: str, wanted: list[int], shapes: dict[str, list[int]], change: Transform) -> None:
    """Raise UserError unless tensors of these shapes make up one that is `wanted`."""
    try:
        made = list(change(*(torch.empty(shape, device="meta") for shape in shapes.values())).shape)
    except (RuntimeError, IndexError):
        made = None
    if made != wanted:
        told = ", ".join(f"{source} has shape {shape}" for source, shape in shapes.items())
        raise UserError(f"{told}; by the config, {wanted} is to be made of it ({name})")


def _routing(found: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The routing that the recipe tells and the tensors do not. Raises UserError where they say otherwise."""
    for name in ("kind", "network", "auxiliary"):
        if name in given and given[name] != found.get(name, False):
            raise UserError(f"router.{name}={given[name]}: the checkpoint's tensors say {found.get(name, False)}")
    return {**found, **given}


def _make(raw: RawTensors, sources: list[str], change: Transform) -> torch.Tensor:
    return change(*(raw.read(name) for name in sources))


def verify_import(
    directory: Path,
    kind: Format,
    fields: dict[str, Any],
    raw: RawTensors,
    config: Any,
    pending: list[Pending],
    dtype: torch.dtype | None,
) -> dict[str, float]:
    """Largest difference between the logits of the written model, reloaded, and of the format's own formulas on the
    checkpoint's own tensors, both in float64, at one recurrence and at the model's R (at most DEPTH), from a random
    state; with a router, at its R.

    Raises UserError where the two differ by more than rounding, where logits are not finite in the checkpoint's dtype,
    and where a tensor, or a field of config.json, is not the one that was to be written.
    """
    check_config(directory, config)
    ids, _ = sample(config, 0)
    ids = ids[:, :16]
    noise = torch.randn(*ids.shape, config.hidden_size, generator=torch.Generator().manual_seed(0)) * 0.1
    depths = {config.num_recurrences} if config.router else {1, min(config.num_recurrences, DEPTH)}

    def read(name: str) -> torch.Tensor:
        with Double.off():
            tensor = raw.read(name)
            return (tensor.to(dtype) if dtype else tensor).double()

    with reloaded(directory) as (model, written), torch.no_grad():
        for tensor in pending:
            check_equal(tensor.name, written.read(tensor.name), tensor.make().to(tensor.dtype))
        if not model(ids, num_recurrences=max(depths), use_cache=False).logits.isfinite().all():
            raise UserError(f"verification failed: logits are not finite in {model.dtype}; {WAY_OUT}")

    def logits(dtype: torch.dtype) -> Iterator[Logits]:
        state = noise.to(dtype) if config.injection != "none" else None
        with reloaded(directory, dtype) as (model, _), torch.no_grad():
            for depth in sorted(depths):
                if config.router:
                    want = mor.logits(config.source_config, config.router, raw.names(), read, ids)
                else:
                    want = reference.logits(kind.name, config.source_config, fields, read, ids, depth, state)
                got = model(ids, num_recurrences=depth, initial_state=state, use_cache=False).logits
                what = f"at {depth} recurrences the imported model, reloaded, and the formulas of {kind.name}"
                yield Logits(what, got.flatten(0, 1), want.flatten(0, 1))

    return {"float64": max((pair.got - pair.want).abs().max().item() for pair in in_double(logits))}
