"""A recurrent-depth checkpoint at a fixed depth as a plain model: its config, its tensors, and their verification."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..model import RecurrentDepthConfig, RecurrentDepthForCausalLM
from ..model.source_layers import layer_list_name
from . import relax
from .agreement import Logits, agreement, in_double
from .double import Double
from .expected import check_config, check_equal
from .pending import Pending
from .published import OTHER_NAMES, published
from .source import SourceWeights
from .source_config import empty_model, written_out
from .stream import streamed
from .verify import reloaded, sample


class Unrolled:
    """The checkpoint in the directory `path`, of `recurrent` config, with `depth` recurrences as layers of their own.

    config: the config of the plain model. tensors: its tensors by its own names. pending: those as they are written
    (see `published`). notes: lines on their names. Use as a context manager, within which the checkpoint's files are
    open.
    """

    def __init__(self, path: Path, recurrent: RecurrentDepthConfig, depth: int):
        self.path, self.recurrent, self.depth = path, recurrent, depth
        assert isinstance(recurrent.dtype, torch.dtype)
        self.dtype = recurrent.dtype
        self.places = recurrent.order(depth)
        layers = [getattr(recurrent, part)[n] for part, n, _ in self.places]
        self.config = written_out(recurrent.source_config, layers)
        with torch.device("meta"):
            model, plain = RecurrentDepthForCausalLM(recurrent), empty_model(self.config)
        self.layers = layer_list_name(plain, len(layers)) + "."
        self.config.dtype, self.config.architectures = recurrent.dtype, [type(plain).__name__]
        self.weights = SourceWeights(path, model)
        self.tensors = list(self._tensors(plain))
        self.pending = published(plain, self.tensors)
        self.notes = [note for kind, note in OTHER_NAMES.items() if kind == self.config.model_type]

    def __enter__(self) -> Unrolled:
        return self

    def __exit__(self, *exc: object) -> None:
        self.weights.__exit__(*exc)

    def _tensors(self, plain: PreTrainedModel) -> Iterator[Pending]:
        """The tensors outside of the layers, which the recurrent model has too, then those of the layers."""
        weights = self.weights
        for name in weights.names():
            if name.startswith("source."):
                target, make = name.removeprefix("source."), partial(weights.read, name)
                yield Pending(target, weights.dtype(name), weights.shape(name), make)
        for number, (part, n, depth) in enumerate(self.places):
            for suffix, tensor in plain.get_submodule(f"{self.layers}{number}").state_dict().items():
                make = partial(relax.at_depth, weights, part, n, suffix, depth)
                # A merged matrix has the checkpoint's type, others their stored one: routers of experts keep float32.
                name, has_lora = relax.stored_at(weights, part, n, suffix)
                kind = self.dtype if has_lora else weights.dtype(name)
                yield Pending(f"{self.layers}{number}.{suffix}", kind, list(tensor.shape), make)

    def verify(self, directory: Path) -> dict[str, float]:
        """Compare the plain checkpoint in `directory` with the recurrent one: largest difference of logits, by dtype.

        Every tensor is compared, a merged one with the merged weight rounded as on writing. Without LoRA, logits are to
        agree (see `agreement`). With LoRA, they are to agree before merged weights are rounded; the result then is the
        effect of that rounding. Raises UserError where anything else makes the two differ.
        """
        check_config(directory, self.config)
        kinds = {tensor.name: tensor.dtype for tensor in self.tensors}
        with reloaded(self.path) as (_, weights), reloaded(directory) as (_, written):
            for name in written.names():
                want = self._expected(weights, name, torch.float32)
                check_equal(name, written.read(name), want.to(kinds[name]))
        ids, mask = sample(self.recurrent, seed=0)
        title = f"the plain model and MODEL at {self.depth} recurrences"

        def run(model: Any, **options: int) -> torch.Tensor:
            with torch.no_grad():
                return model(ids, attention_mask=mask, use_cache=False, **options).logits[mask.bool()]

        def logits(dtype: torch.dtype) -> Iterator[Logits]:
            with reloaded(self.path, dtype) as (model, _), reloaded(directory, dtype) as (plain, _):
                yield Logits(title, run(plain), run(model, num_recurrences=self.depth))

        def unrounded(dtype: torch.dtype) -> Iterator[Logits]:
            with reloaded(self.path, dtype) as (model, weights):
                read = partial(self._expected, weights, dtype=dtype)
                plain = streamed(lambda: empty_model(self.config), read, dtype)
                yield Logits(f"{title}, before rounding,", run(plain), run(model, num_recurrences=self.depth))

        if not self.recurrent.relaxation:
            return agreement(logits, self.dtype)
        in_double(unrounded)
        with Double():
            (pair,) = logits(torch.float64)
        return {"float64": (pair.got - pair.want).abs().max().item()}

    def _expected(self, weights: SourceWeights, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Tensor `name` of the plain model, from the recurrent checkpoint's `weights`; a merged one in `dtype`."""
        if not name.startswith(self.layers):
            return weights.read(f"source.{name}")
        number, _, suffix = name.removeprefix(self.layers).partition(".")
        part, n, depth = self.places[int(number)]
        return relax.at_depth(weights, part, n, suffix, depth, dtype)
