"""Every tensor of a converted checkpoint: its name, its shape, and the making of its values from the source's."""

from __future__ import annotations

import copy
import hashlib
from functools import partial

import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..model import RecurrentDepthConfig
from ..model.injection import Injection
from ..model.router import Router
from ..model.source_layers import layer_list_name
from .pending import Pending
from .plan import PARTS, Plan
from .recipe import ConvertRecipe, Lora
from .relax import LowRank, as_matrix
from .source import SourceWeights


class Tensors:
    """The tensors of the output.

    pending: all of them, in the order in which they are written. Values are made when they are written, from one source
        tensor (or a few) at a time.
    low_rank: the LoRA factors of each relaxed matrix, by its name `relaxation.N.PATH`.

    source_model is on the meta device; dtype is the type of the output, None for the source's own types. Averages and
    SVDs are computed on `device`. Raises UserError for layers to be averaged whose shapes differ.
    """

    def __init__(
        self,
        config: RecurrentDepthConfig,
        plan: Plan,
        recipe: ConvertRecipe,
        source_model: PreTrainedModel,
        weights: SourceWeights,
        dtype: torch.dtype | None,
        device: torch.device,
    ):
        self.config, self.plan, self.recipe, self.device = config, plan, recipe, device
        self.model, self.weights, self.dtype = source_model, weights, dtype
        self.layers = layer_list_name(source_model, config.source_config.num_hidden_layers) + "."
        self.pending: list[Pending] = []
        self.low_rank: dict[str, LowRank] = {}
        self._fresh: tuple[int, dict[str, torch.Tensor]] = (-1, {})
        for name in weights.names():
            if not name.startswith(self.layers):
                self._add(f"source.{weights.stored_name(name)}", [name])
        for part in PARTS:
            for n in range(len(getattr(plan, part))):
                self._add_layer(part, n)
        if config.relaxation:
            for n in range(len(plan.core)):
                self._add_relaxation(n)
        self._add_injection()
        if config.router:
            self._add_router()

    def _add(self, name: str, sources: list[str]) -> None:
        """Add tensor `name`: the source's tensor, or the mean of several. Raises UserError for different shapes."""
        shapes = {tuple(self.weights.shape(source)) for source in sources}
        if len(shapes) > 1:
            raise UserError(f"{sources[0]} and the tensors to average it with differ in shape: {sorted(shapes)}")
        make = partial(_mean, self.weights, sources, self.device)
        self.pending.append(Pending(name, self._dtype_of(sources[0]), self.weights.shape(sources[0]), make, sources[0]))

    @property
    def dtype_of_new(self) -> torch.dtype:
        """The type of tensors that no source has."""
        assert isinstance(self.config.dtype, torch.dtype)
        return self.config.dtype

    def _dtype_of(self, source: str) -> torch.dtype:
        """The type of a tensor that is made from tensor `source`."""
        return self.dtype or self.weights.dtype(source)

    def _suffixes(self, layer: int) -> list[str]:
        """The names of a source layer's parameters, within the layer."""
        first = f"{self.layers}{layer}."
        return [name.removeprefix(first) for name in self.weights.names() if name.startswith(first)]

    def _add_layer(self, part: str, n: int) -> None:
        """Add the parameters of layer n of `part` that are the same at every depth."""
        parents = self.plan.parents[part][n]
        layer = getattr(self.plan, part)[n]
        relaxation = self.config.relaxation if part == "core" else None
        for suffix in self._suffixes(layer):
            if relaxation and suffix in relaxation["own"]:
                continue
            if parents:
                self._add(f"{part}.{n}.{suffix}", [f"{self.layers}{parent}.{suffix}" for parent in parents])
            else:
                source = f"{self.layers}{layer}.{suffix}"
                make, shape = partial(self._random, n, suffix), self.weights.shape(source)
                name, dtype = f"{part}.{n}.{suffix}", self._dtype_of(source)
                self.pending.append(Pending(name, dtype, shape, make, group=f"{part}.{n}"))

    def _random(self, n: int, suffix: str) -> torch.Tensor:
        """Parameter `suffix` of core layer n, initialized as transformers does, by a seed of its own for the layer."""
        if self._fresh[0] != n:
            layer = copy.deepcopy(self.model.get_submodule(f"{self.layers}{self.plan.core[n]}")).to_empty(device="cpu")
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(_seed(self.recipe.seed, "random", n))
                layer.apply(self.model._init_weights)  # pyright: ignore[reportPrivateUsage]
            self._fresh = (n, dict(layer.state_dict()))
        return self._fresh[1][suffix]

    def _add_relaxation(self, n: int) -> None:
        """Add the parameters that core layer n has for itself at every depth, and its LoRA factors."""
        relaxation, plan, lora = self.config.relaxation, self.plan, self.recipe.lora
        assert lora is not None
        assert relaxation is not None
        for suffix in relaxation["own"]:
            names = [f"{self.layers}{depth[n]}.{suffix}" for depth in plan.stands_for]
            shape = [len(names), *self.weights.shape(names[0])]
            make = partial(_stacked, self.weights, names)
            self.pending.append(Pending(f"relaxation.{n}.{suffix}", self._dtype_of(names[0]), shape, make))
        for path, rank in relaxation["rank"].items():
            self._add_factors(n, path, rank, relaxation["depths"], lora)

    def _add_factors(self, n: int, path: str, rank: int, depths: int, lora: Lora) -> None:
        """Add the LoRA factors of module `path` of core layer n."""
        zero = self.recipe.method == "retrofit" or self.recipe.init == "random"
        source = f"{self.layers}{self.plan.core[n]}.{path}.weight"
        transposed = self.weights.is_transposed(source.removesuffix(".weight"))
        kept = next(t for t in self.pending if t.name == f"core.{n}.{path}.weight")

        def tied() -> torch.Tensor:
            return as_matrix(kept.make().to(self.device, kept.dtype), transposed)

        def replaced(depth: int) -> torch.Tensor:
            layer = self.plan.stands_for[depth][n]
            return as_matrix(self.weights.read(f"{self.layers}{layer}.{path}.weight").to(self.device), transposed)

        factors = LowRank(
            rank=rank,
            depths=depths,
            init=lora.init or ("zero" if zero else "svd"),
            dora=lora.dora,
            seed=_seed(self.recipe.seed, path, n),
            tied=tied,
            replaced=replaced,
        )
        group = f"relaxation.{n}.{path}"
        self.low_rank[group] = factors
        out, width = self.weights.shape(source)[:: -1 if transposed else 1]
        shapes = {"lora_A": [rank, width], "lora_B": [out, rank], "dora_magnitude": [out]}
        for name in list(shapes)[: 3 if lora.dora else 2]:
            shape, make = [depths, *shapes[name]], partial(factors.take, name)
            dtype = self._dtype_of(source)
            self.pending.append(Pending(f"{group}.{name}", dtype, shape, make, group=group, error=factors.measured))

    def _add_injection(self) -> None:
        """Add injection, damping, recurrence encoding, halting gate and recurrence norm, with values that keep the
        source."""
        width, dtype, injection = self.config.source_config.hidden_size, self.dtype_of_new, self.plan.injection
        if injection in ("linear", "decayed"):
            make = partial(Injection.preserving_weight, injection, width, self.plan.state_init)
            shape = [width, 2 * width if injection == "linear" else width]
            self.pending.append(Pending("injection.weight", dtype, shape, make))
            if injection == "decayed":
                self.pending.append(Pending("injection.decay", dtype, [width], partial(torch.zeros, width)))
        elif injection == "gated":
            for name, shape in (("weight", [width, 2 * width]), ("bias", [width])):
                self.pending.append(Pending(f"injection.{name}", dtype, shape, partial(torch.zeros, shape)))
        if self.plan.recurrence_damping == "learned":
            self.pending.append(Pending("damping.weight", dtype, [width], partial(torch.zeros, width)))
        if self.plan.recurrence_encoding == "sinusoidal":
            self.pending.append(Pending("recurrence_encoding.weight", dtype, [width], partial(torch.zeros, width)))
        if self.plan.halting == "act":
            for name, shape in (("weight", [1, width]), ("bias", [1])):
                self.pending.append(Pending(f"halting_gate.{name}", dtype, shape, partial(torch.zeros, shape)))
        if self.plan.recurrence_norm == "each":
            self.pending.append(Pending("recurrence_norm.weight", dtype, [width], partial(torch.ones, width)))

    def _add_router(self) -> None:
        """Add the router as `Router.reset_parameters` starts it, by a seed of its own."""
        assert self.config.router is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(self.recipe.seed, "router"))
            router = Router(self.config.source_config.hidden_size, self.config.router)
            router.reset_parameters(self.config.initializer_std)
        for name, tensor in router.state_dict().items():
            make = partial(torch.clone, tensor)
            self.pending.append(Pending(f"router.{name}", self.dtype_of_new, list(tensor.shape), make))


def worst(errors: dict[str, float]) -> dict[str, float]:
    """The greatest error of LoRA factors by target, of errors by `relaxation.N.PATH`."""
    found: dict[str, float] = {}
    for name, error in sorted(errors.items()):
        target = name.split(".", 2)[2]
        found[target] = max(found.get(target, 0.0), error)
    return found


def _mean(weights: SourceWeights, names: list[str], device: torch.device) -> torch.Tensor:
    """The tensor of the only name, or the mean of several, summed in float32 on `device`."""
    if len(names) == 1:
        return weights.read(names[0])
    total = weights.read(names[0]).to(device, torch.float32, copy=True)  # of the mapped file
    for name in names[1:]:
        total += weights.read(name).to(device).float()
    return total.div_(torch.tensor(float(len(names)), device=device))  # by a plain number CUDA multiplies its inverse


def _stacked(weights: SourceWeights, names: list[str]) -> torch.Tensor:
    """The tensors of these names in one, by depth."""
    return torch.stack([weights.read(name) for name in names])


def _seed(seed: int, *what: object) -> int:
    """A seed for the purpose `what`, a function of it and the recipe's seed alone."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *what)).encode(), digest_size=7).digest(), "big")
