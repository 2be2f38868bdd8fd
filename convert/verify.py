"""Verification of a written checkpoint: reloaded, against the source architecture's own model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UserError
from ..load import read_config
from ..model import RecurrentDepthForCausalLM
from ..model.source_layers import FINAL_NORM, layer_list_name
from .agreement import WAY_OUT, Logits, agreement
from .dtypes import dtype_name
from .expected import Expected, check_tensors
from .pending import Pending
from .plan import Plan
from .relax import merged
from .source import SourceWeights
from .source_config import empty_model, written_out
from .stream import streamed

DEPTH = 4  # recurrences that are verified: every further one computes the same
LENGTH = 32  # tokens of a sequence on which logits are compared


def verify(
    directory: Path,
    plan: Plan,
    weights: SourceWeights,
    pending: list[Pending],
    dtype: torch.dtype | None,
    seed: int,
    zero_lora: bool = False,
) -> dict[str, float]:
    """Compare the checkpoint in `directory` with the source's layers: the largest difference of logits, by dtype.

    First every tensor is compared with the source's (see `check_tensors`). Then two models run on two random sequences,
    one padded on the left: the checkpoint, reloaded, and a plain one with the source's layers written out. One module's
    weights are in memory at a time. Their logits are to agree (see `agreement`) at one recurrence; where more
    recurrences are layers and nothing else, also at the plan's R (at most DEPTH), with the keys of every depth.

    An injection is checked from the state that it starts to preserve: s_0 = e where `state_init` is `input`, else
    zeros. A router is left out of the comparison, as the source has none. With both, logits from the model's own state
    are to be finite. Random layers and LoRA factors are taken from the checkpoint. Raises UserError where the two
    differ by more than rounding.
    """
    source_config = weights.config
    ids, mask = sample(source_config, seed)
    deep = min(plan.num_recurrences, DEPTH)
    with torch.device("meta"):
        layers = layer_list_name(empty_model(source_config), source_config.num_hidden_layers) + "."
    expected = Expected(plan, weights, layers, dtype)
    with reloaded(directory) as (model, written), torch.no_grad():
        check_tensors(written, expected, pending, zero_lora)
        at = plan.num_recurrences if model.config.router else deep
        found = model(ids, attention_mask=mask, num_recurrences=at, use_cache=False).logits
        if not found[mask.bool()].isfinite().all():
            raise UserError(
                f"verification failed: from its initial state ({plan.state_init}), at {at} recurrences, the model's "
                f"logits are not finite in {dtype_name(model.dtype)}; {WAY_OUT}"
            )
    plain = plan.injection == "none" and not plan.recurrence_residual and plan.halting == "none"
    from_input = plan.state_init == "input" and plan.injection != "add"

    def logits(dtype: torch.dtype) -> Iterator[Logits]:
        state = None if from_input else torch.zeros(*ids.shape, source_config.hidden_size, dtype=dtype)
        with reloaded(directory, dtype) as (model, written), torch.no_grad():
            model.config.router = None
            model.config.kv_policy = "per-depth"  # as the source's layers
            for depth in sorted({1, deep} if plain else {1}):
                reference = _written_out(expected, source_config, written, depth, dtype)
                want = reference(ids, attention_mask=mask, use_cache=False)
                got = model(ids, attention_mask=mask, num_recurrences=depth, initial_state=state, use_cache=False)
                title = f"at {depth} recurrences the written model, reloaded, and the source's layers written out"
                yield Logits(title, got.logits[mask.bool()], want.logits[mask.bool()])

    return agreement(logits, model.dtype)


def sample(config: PreTrainedConfig, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids and their mask, both [2, T]: the first sequence is padded on the left."""
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return ids, mask


@contextmanager
def reloaded(
    directory: Path, dtype: torch.dtype | None = None
) -> Generator[tuple[RecurrentDepthForCausalLM, SourceWeights]]:
    """The model of the checkpoint in `directory` and its weights, which it reads when it runs.

    dtype: the type in which it computes; None for that of its config. A plain checkpoint gives a plain model.
    """
    config: PreTrainedConfig = read_config(directory)
    with torch.device("meta"):
        empty = empty_model(config)
    with SourceWeights(directory, empty) as weights:
        stored: Any = config.dtype
        model: Any = streamed(lambda: empty_model(config), weights.read, dtype or stored)
        yield model, weights


def _written_out(
    expected: Expected, source_config: PreTrainedConfig, written: SourceWeights, depth: int, dtype: torch.dtype
) -> PreTrainedModel:
    """The source architecture with prelude, `depth` times the core, and coda as layers of its own.

    It shares no code with the recurrence of the model, whose oracle it is.
    """
    plan, recurrent = expected.plan, written.recurrent_config
    places = recurrent.order(depth)
    config = written_out(source_config, [getattr(plan, part)[n] for part, n, _ in places])
    with torch.device("meta"):
        layers = layer_list_name(empty_model(config), config.num_hidden_layers) + "."
    relaxation = recurrent.relaxation or {"rank": {}, "own": []}

    def read(name: str) -> torch.Tensor:
        if not name.startswith(layers):
            return expected.kept(name)
        number, _, suffix = name.removeprefix(layers).partition(".")
        part, n, d = places[int(number)]
        d = min(d, len(plan.stands_for) - 1)
        path = suffix.removesuffix(".weight")
        if part == "core" and suffix in relaxation["own"]:
            return expected.own(n, suffix, d)
        tied = expected.tied(part, n, suffix)
        tied = written.read(f"{part}.{n}.{suffix}") if tied is None else tied
        if part == "core" and path in relaxation["rank"]:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            return merged(written, n, path, d, tied, wide)
        return tied

    model = streamed(lambda: empty_model(config), read, dtype)
    if plan.recurrence_norm == "between":  # before damping, whose first state is the normed one
        final = model.get_submodule(FINAL_NORM)
        for number, (part, n, r) in enumerate(places):
            if part == "core" and n == 0 and r:
                model.get_submodule(f"{layers}{number}").register_forward_pre_hook(
                    partial(_norm, final), with_kwargs=True
                )
    _damp(model, layers, places, plan.recurrence_damping)
    if plan.recurrence_norm == "each":
        for number, (part, n, _) in enumerate(places):
            if part == "core" and n == len(plan.core) - 1:
                model.get_submodule(f"{layers}{number}").register_forward_hook(_rms_norm_hook(recurrent.norm_eps))
    return model


def _damp(model: PreTrainedModel, layers: str, places: list[tuple[str, int, int]], damping: float | str) -> None:
    """Damp the recurrences of `model`, whose layers stand at `places`, by the `damping` of a plan."""
    if damping == 1:
        return
    core = [i for i, (part, _, _) in enumerate(places) if part == "core"]
    recurrences = 1 + max(places[i][2] for i in core)
    share = {"1/R": 1 / recurrences, "learned": 0.5}.get(str(damping), damping)
    for r in range(0 if damping == "1/R" else 1, recurrences):
        own = [model.get_submodule(f"{layers}{i}") for i in core if places[i][2] == r]
        seen: list[torch.Tensor] = []
        own[0].register_forward_pre_hook(partial(_remember, seen), with_kwargs=True)
        own[-1].register_forward_hook(partial(_mix, seen, float(share)))


def _remember(seen: list[torch.Tensor], layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook that puts a layer's hidden states into `seen`."""
    seen[:] = [args[0] if args else kwargs["hidden_states"]]


def _norm(norm: nn.Module, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook that norms a layer's hidden states."""
    if args:
        return (norm(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": norm(kwargs["hidden_states"])}


def _mix(seen: list[torch.Tensor], share: float, layer: nn.Module, args: Any, out: Any) -> Any:
    """A forward hook that mixes a layer's output with the states in `seen`."""
    first = out[0] if isinstance(out, tuple) else out
    mixed = (1 - share) * seen[0] + share * first
    return (mixed, *out[1:]) if isinstance(out, tuple) else mixed


def _rms_norm_hook(eps: float) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook that norms a layer's hidden states: a new recurrence norm has weights of one."""

    def hook(layer: nn.Module, args: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        normed = nn.functional.rms_norm(first, first.shape[-1:], None, eps)
        return (normed, *out[1:]) if isinstance(out, tuple) else normed

    return hook
