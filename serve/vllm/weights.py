"""From the names of a recurrent-depth checkpoint to those of the source architecture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from ...model import RecurrentDepthConfig, RecurrentDepthForCausalLM


def source_name(name: str, config: RecurrentDepthConfig, layers: str) -> str:
    """Checkpoint tensor `name` as the source architecture calls it; its list of layers stands at `layers`.

    The source has as many layers as the checkpoint has sets of weights: prelude, core, coda in this order.
    """
    part, _, rest = name.partition(".")
    start = {"prelude": 0, "core": len(config.prelude), "coda": len(config.prelude) + len(config.core)}
    if part in start:
        number, _, rest = rest.partition(".")
        return f"{layers}.{start[part] + int(number)}.{rest}"
    if part != "source":
        raise ValueError(f"{name!r} is not the name of a recurrent-depth checkpoint's tensor")
    return rest


class Completeness:
    """Counts off the tensors of a checkpoint against those that the transformers model of `config` saves."""

    def __init__(self, config: RecurrentDepthConfig):
        with torch.device("meta"):
            model = RecurrentDepthForCausalLM(config)
        self._tensors = dict(model.state_dict(keep_vars=True))
        self._seen: set[int] = set()
        # transformers has renamed modules since some architectures' files were first written, and saves the old names.
        self._changes = get_model_conversion_mapping(model)

    def see(self, name: str, shape: Sequence[int] | None = None) -> None:
        """Count off tensor `name`. Raises ValueError where the model has no such tensor, or one of another `shape`."""
        key, whole = name, True
        for change in self._changes:
            key, matched = change.rename_source_key(key)
            whole &= matched is None or not isinstance(change, WeightConverter)  # which makes one tensor of several
        if key not in self._tensors:
            raise ValueError(f"unexpected tensor {name!r} in the checkpoint")
        wanted = list(self._tensors[key].shape)
        if shape is not None and whole and list(shape) != wanted:
            raise ValueError(f"tensor {name!r} has shape {list(shape)}; config.json says {wanted}")
        self._seen.add(id(self._tensors[key]))  # of tied tensors, one suffices

    def check(self) -> None:
        """Raises ValueError, naming tensors that did not come by."""
        missing = sorted(name for name, tensor in self._tensors.items() if id(tensor) not in self._seen)
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(f"the checkpoint lacks {', '.join(missing[:3])}{more}")
