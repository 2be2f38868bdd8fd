"""Import of public recurrent-depth checkpoints as recurrent-depth models of ours."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import config_fields, read_json
from ..errors import UserError, reason
from ..find_source import HubWeights
from ..gguf_source import find_gguf
from ..model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from .agreement import WAY_OUT, Logits, in_double
from .architectures import SUPPORTED
from .conversion import Conversion, Written
from .convert_checkpoint import can_fold
from .double import Double
from .dtypes import common_dtype, dtype_name, named_dtype
from .expected import check_config, check_equal
from .formats import FORMATS, Format, recognize, refuse_unsupported
from .formats.base import Checkpoint, CheckpointMap, Transform
from .generation import FILE
from .pending import Pending
from .plan import PARTS
from .quantised import dtype_in, find_method
from .raw import RawTensors
from .recipe import ConvertRecipe
from .source import TABLES
from .verify import DEPTH, reloaded, sample

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
LENGTH = 16  # tokens of a sequence on which an import is verified
STATE_STD = 0.1  # scale of the random state from which an import is verified


def is_recurrent(path: Path, recipe: ConvertRecipe, there: HubWeights | None = None) -> bool:
    """True where the directory `path` holds a public recurrent-depth checkpoint, which is imported.

    there: its weights on the hub, where `path` lacks them.

    Raises UserError for a recipe without a method for any other checkpoint, for keys that an import does not take, and
    for a recurrent model that is known and not supported.
    """
    refuse_unsupported(path)
    fields = config_fields(path)
    model_type = fields["model_type"]
    plain = there is None and find_gguf(path)
    formats = [known for known in FORMATS if known.model_type == model_type and not plain]
    if formats and model_type in SUPPORTED:  # plain, unless the tensors are those of a format
        method = find_method(fields, path, bool(recipe.dequantize))
        with RawTensors(path, there, method, dtype_in(fields)) as raw:
            formats = [known for known in formats if known.mismatch(fields, raw.names()) is None]
    if not formats:
        if recipe.method is None:
            folds = there is None and can_fold(path)  # from the hub, all layers that repeat would be downloaded
            raise UserError(
                f"{path} ({model_type}) is no recurrent checkpoint that could be imported, so say how to make one of "
                "it: method=retrofit with sizes=P,C,D or layers.prelude, layers.core, layers.coda; or method=recursive "
                f"with loops=B{'; or method=fold, as some of its layers repeat' if folds else ''}"
            )
        return False
    fitting = frozenset[str]().union(*(known.recipe_keys for known in formats))
    given = sorted(recipe.model_fields_set - fitting, key=lambda key: (key == "method", key))
    if given:
        raise UserError(
            f"{path} ({model_type}) is a recurrent model already and is imported as it is: leave out {given[0]}"
        )
    return True


@contextmanager
def open_import(path: Path, recipe: ConvertRecipe, there: HubWeights | None = None) -> Generator[ImportConversion]:
    """The import of the recurrent-depth checkpoint in the directory `path`; its files are open within the block.

    there: its weights on the hub, where `path` lacks them. Raises UserError for a checkpoint of no known format, and
    where config.json, tensors and recipe do not fit together.
    """
    fields = config_fields(path)
    method = find_method(fields, path, bool(recipe.dequantize))
    with RawTensors(path, there, method, dtype_in(fields)) as raw:
        yield ImportConversion(path, recognize(fields, raw.names()), fields, raw, recipe)


class ImportConversion(Conversion):
    """The import of a checkpoint of format `kind`, with config.json `fields` and the tensors `raw`.

    Raises UserError for a config.json without the fields of the format, and for missing or unknown tensors.
    """

    def __init__(self, path: Path, kind: Format, fields: dict[str, Any], raw: RawTensors, recipe: ConvertRecipe):
        self.kind, self.fields, self.raw = kind, fields, raw
        self.dtype = named_dtype(recipe.dtype)
        mapped, config, shapes = _map(kind, fields, raw, recipe)
        mapped.ignored |= {name for name in raw.names() if name.endswith(TABLES)}
        _check_tensors(kind.name, mapped, raw, shapes)
        self.known = mapped.known
        stored = {name: raw.dtype(sources[0]) for name, (sources, _) in mapped.tensors.items() if sources}
        config.dtype = self.dtype or common_dtype((dtype, shapes[name]) for name, dtype in stored.items())
        config.architectures = [RecurrentDepthForCausalLM.__name__]
        pending = [
            Pending(
                name,
                self.dtype or stored.get(name, config.dtype),
                shapes[name],
                partial(_make, raw, sources, transform),
                ", ".join(sources),
            )
            for name, (sources, transform) in mapped.tensors.items()
        ]
        super().__init__(path, recipe, config, pending, raw.files, _facts(kind, config, raw, mapped))

    def check(self) -> None:
        """Raise UserError for a tensor that is left out as known, and has other values."""
        for name, known in self.known.items():
            read, there = self.raw.read, name in self.raw.names()
            if there and not _equals(read(name), known.values(read), known.tolerance):
                raise UserError(f"tensor {name} of this {self.kind.name} checkpoint is not {known.name}")

    def finish(self, directory: Path, written: Written) -> dict[str, Any]:
        """Replace the special tokens of generation_config.json where all are 0, as Ouro's released files have them."""
        file = directory / FILE
        fields = read_json(file) if file.is_file() else {}
        if fields and {fields.get(name) for name in SPECIAL_TOKENS} <= {0, None}:
            fields |= {name: getattr(self.config, name) for name in SPECIAL_TOKENS}
            file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        return {}

    def verify(self, directory: Path) -> dict[str, float]:
        """Largest difference between the logits of the model in `directory` and of the authors' formulas, in float64.

        The formulas run on the source's own tensors from a random state. The depths are one recurrence and the model's
        R (at most DEPTH); with a router, its R alone. Raises UserError for differences beyond rounding, and for logits
        that are not finite in the checkpoint's dtype. So it does for a tensor or field of config.json that is wrong.
        """
        config = self.config
        check_config(directory, config)
        ids = sample(config, 0)[0][:, :LENGTH]
        depths = {config.num_recurrences} if config.router else {1, min(config.num_recurrences, DEPTH)}
        with reloaded(directory) as (model, written), torch.no_grad():
            for tensor in self.pending:
                check_equal(tensor.name, written.read(tensor.name), tensor.make().to(tensor.dtype))
            if not model(ids, num_recurrences=max(depths), use_cache=False).logits.isfinite().all():
                raise UserError(f"verification failed: logits are not finite in {dtype_name(model.dtype)}; {WAY_OUT}")
        pairs = in_double(lambda dtype: self._logits(directory, ids, sorted(depths), dtype))
        return {"float64": max((pair.got - pair.want).abs().max().item() for pair in pairs)}

    def _logits(self, directory: Path, ids: torch.Tensor, depths: list[int], dtype: torch.dtype) -> Iterator[Logits]:
        """Logits of the written model and of the formulas for ids [B, T], at each depth."""
        checkpoint = Checkpoint(self.config, self.fields, self.raw.names(), self._read)
        noise = torch.randn(*ids.shape, self.config.hidden_size, generator=torch.Generator().manual_seed(0))
        state = (noise * STATE_STD).to(dtype) if self.config.injection != "none" else None
        with reloaded(directory, dtype) as (model, _), torch.no_grad():
            model.config.kv_policy = "per-depth"  # as the formulas
            for depth in depths:
                want = self.kind.reference(checkpoint, ids, depth, state)
                got = model(ids, num_recurrences=depth, initial_state=state, use_cache=False).logits
                title = f"at {depth} recurrences the imported model, reloaded, and the formulas of {self.kind.name}"
                yield Logits(title, got.flatten(0, 1), want.flatten(0, 1))

    def _read(self, name: str) -> torch.Tensor:
        """A tensor on disk in float64, rounded as the written one."""
        with Double.off():
            tensor = self.raw.read(name)
            return (tensor.to(self.dtype) if self.dtype else tensor).double()


def _map(
    kind: Format, fields: dict[str, Any], raw: RawTensors, recipe: ConvertRecipe
) -> tuple[CheckpointMap, RecurrentDepthConfig, dict[str, list[int]]]:
    """The map of the checkpoint, the config of the model with what the recipe adds, and the shapes of its tensors.

    Raises UserError for a config.json from which no model can be built.
    """
    options: dict[str, Any] = {"num_recurrences": recipe.num_recurrences, "max_recurrences": recipe.max_recurrences}
    options |= {"state_init": recipe.state_init, "state_seed": recipe.seed, "kv_policy": recipe.kv_policy}
    options["exit"] = recipe.exit.model_dump(exclude_none=True) if recipe.exit else None
    try:
        mapped = kind.mapping(fields, raw)
        chosen = {**mapped.fields, **{key: value for key, value in options.items() if value is not None}}
        if recipe.router:
            chosen["router"] = _routing(mapped.fields["router"], recipe.router.model_dump(exclude_none=True))
        config = RecurrentDepthConfig(**chosen)
        with torch.device("meta"):
            model = RecurrentDepthForCausalLM(config)
    except KeyError as error:
        raise UserError(f"config.json of a {kind.name} checkpoint lacks {error.args[0]!r}") from None
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    except Exception as error:  # transformers and torch share no base class for errors in a config
        raise UserError(f"config.json: no {kind.name} model can be built from it ({reason(error)})") from None
    return mapped, config, {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_tensors(kind: str, mapped: CheckpointMap, raw: RawTensors, shapes: dict[str, list[int]]) -> None:
    """Raise UserError unless the checkpoint has the tensors of the map, no others, and of the right shapes."""
    needed = {name for names, _ in mapped.tensors.values() for name in names}
    if missing := sorted(needed - raw.names()):
        raise UserError(f"a {kind} checkpoint has a tensor {missing[0]}, and this one lacks it")
    if unknown := sorted(raw.names() - needed - mapped.ignored):
        raise UserError(f"tensor {unknown[0]} is not one of a {kind} checkpoint; nothing of it could be kept")
    for name, (sources, transform) in mapped.tensors.items():
        _check_shape(name, shapes[name], {source: raw.shape(source) for source in sources}, transform)


def _equals(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    """True where two tensors are of one shape and equal within `tolerance`."""
    if got.shape != want.shape or not tolerance:
        return torch.equal(got, want)
    return torch.allclose(got.double(), want.double(), rtol=0, atol=tolerance)


def _check_shape(name: str, wanted: list[int], shapes: dict[str, list[int]], transform: Transform) -> None:
    """Raise UserError unless the transform makes a tensor of shape `wanted` from tensors of `shapes`."""
    try:
        made = list(transform(*(torch.empty(shape, device="meta") for shape in shapes.values())).shape)
    except (RuntimeError, IndexError):
        made = None
    if made != wanted:
        found = ", ".join(f"{source} has shape {shape}" for source, shape in shapes.items())
        raise UserError(f"{found}; by the config, {name} needs shape {wanted}")


def _routing(found: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The router of the tensors with the fields of the recipe. Raises UserError where the two contradict each other."""
    for name in ("kind", "network", "auxiliary"):
        if name in given and given[name] != found.get(name, False):
            raise UserError(f"router.{name}={given[name]}: by the checkpoint's tensors it is {found.get(name, False)}")
    if given.get("update") == "step":
        raise UserError("router.update=step: the checkpoint's authors add to the state; leave it out")
    return {**found, **given}


def _make(raw: RawTensors, sources: list[str], transform: Transform) -> torch.Tensor:
    """The tensor that `transform` makes of the tensors `sources` on disk."""
    return transform(*(raw.read(name) for name in sources))


def _facts(kind: Format, config: RecurrentDepthConfig, raw: RawTensors, mapped: CheckpointMap) -> dict[str, Any]:
    """The facts of an import for loopwise.json; every layer is its own parent."""
    parts: dict[str, list[int]] = {part: getattr(config, part) for part in PARTS}
    return {
        "format": kind.name,
        "plan": {
            **parts,
            "parents": {part: [[layer] for layer in layers] for part, layers in parts.items()},
            "dropped": [],
            **{key: getattr(config, key) for key in ("sharing", "injection", "recurrence_norm", "state_init")},
            "num_recurrences": config.num_recurrences,
        },
        "parameters": {"source": sum(torch.Size(raw.shape(name)).numel() for name in raw.names() - mapped.ignored)},
        "notes": mapped.notes,
    }
