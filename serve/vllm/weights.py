"""From the names of a recurrent-depth checkpoint to those of the source architecture."""

from __future__ import annotations

import torch
from transformers.conversion_mapping import get_model_conversion_mapping

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
        self._tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
        self._seen: set[int] = set()
        # transformers has renamed modules since some architectures' files were first written, and saves the old names.
        self._renamings = get_model_conversion_mapping(model)

    def see(self, name: str) -> None:
        """Count off tensor `name`. Raises ValueError where the model has no such tensor."""
        key = name
        for renaming in self._renamings:
            key, _ = renaming.rename_source_key(key)
        if key not in self._tensors:
            raise ValueError(f"unexpected tensor {name!r} in the checkpoint")
        self._seen.add(self._tensors[key])  # of tied tensors, one suffices

    def check(self) -> None:
        """Raises ValueError, naming tensors that did not come by."""
        missing = sorted(name for name, tensor in self._tensors.items() if tensor not in self._seen)
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(f"the checkpoint lacks {', '.join(missing[:3])}{more}")
