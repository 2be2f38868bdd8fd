"""The keys of a convert recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from ..exit_rules import ExitRule
from ..recipe import Count, Integer, Integers, Number, Section
from ..unused import Unused

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]  # a projection of a layer
TARGETS: tuple[str, ...] = get_args(Target)
Targets = Annotated[list[Target], Field(min_length=1)]
Capacities = list[Annotated[Number, Field(gt=0, le=1)]]
Thresholds = list[Annotated[Number, Field(ge=0, le=1)]]
Damping = Literal["1/R", "learned"]  # beside numbers
SWITCH = TypeAdapter(bool)
DEEPEST = 4096  # recurrences
AVERAGE_FROM = 1 / 4  # rank over hidden_size, from which tied layers start and end at a lower loss as averages
FOLD_KEYS = (
    "method",
    "max_recurrences",
    "kv_policy",
    "exit",
    "dtype",
    "dequantize",
    "revision",
    "workers",
    "seed",
)  # of method=fold
Depth = Annotated[Count, Field(le=DEEPEST)]


def _rank(value: object) -> object:
    """`value` unchanged. Raises ValueError unless it is a rank, or ranks by target."""
    given = cast("dict[object, object]", value) if isinstance(value, dict) else {}
    numbers, targets = list(given.values()) if isinstance(value, dict) else [value], list(given)
    if not numbers or not set(targets) <= set(TARGETS) or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError(f"an integer above 0, or one for each target of {', '.join(TARGETS)}, as {{q: 8, down: 32}}")
    return value


def _damping(value: object) -> object:
    """`value`, a number from its text. Raises ValueError unless it is a damping."""
    if value in get_args(Damping):
        return value
    try:
        share = 0.0 if isinstance(value, bool) else float(cast(Any, value))
    except (TypeError, ValueError):
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"a number above 0, at most 1; or one of {', '.join(get_args(Damping))}")
    return share


def _recurrence_norm(value: object) -> object:
    """`value`, true or false from what pydantic takes for it. Raises ValueError unless it is a recurrence norm."""
    try:
        return value if value == "between" else SWITCH.validate_python(value)
    except ValidationError:
        raise ValueError("true, false or between") from None


class Layers(Section):
    """Explicit source-layer ids, counted from 0."""

    prelude: Integers = Field([], description="source layers that run once, first")
    core: Integers = Field([], description="source layers that recur")
    coda: Integers = Field([], description="source layers that run once, last")


class Lora(Section):
    """Relaxation: a LoRA for every layer of the core at every depth; norms and biases that differ stay per depth."""

    rank: Annotated[
        int | dict[str, int], BeforeValidator(_rank, json_schema_input_type=Count | dict[Target, Count])
    ] = Field(description="rank r, or one for each target: {q: 8, down: 32}")
    targets: Targets | None = Field(
        None, description=f"projections that get one: {', '.join(TARGETS)} (default: all, or those that rank names)"
    )
    init: Literal["svd", "zero"] | None = Field(
        None, description="truncated svd of W_source - W_tied, or zero (default: recursive svd, retrofit zero)"
    )
    dora: bool = Field(False, description="learn the row norms of the relaxed matrices too (DoRA)")

    @model_validator(mode="after")
    def _consistent(self) -> Lora:
        if isinstance(self.rank, dict) and self.targets is not None:
            raise ValueError("rank names its targets; leave targets out")
        return self

    def ranks(self) -> dict[str, int]:
        """Rank by target."""
        if isinstance(self.rank, dict):
            return self.rank
        return dict.fromkeys(self.targets or TARGETS, self.rank)


class Router(Section):
    """Choice of the tokens of a recurrence. An import takes from here the fields that its config.json lacks."""

    kind: Literal["expert", "token"] | None = Field(
        None,
        description="expert: every recurrence chooses among the tokens of the one before; token: every token chooses "
        "its depth (default: expert)",
    )
    capacity: Capacities | None = Field(
        None, description="expert: share of the sequence that each recurrence takes (default: 1, (B-1)/B, .., 1/B)"
    )
    alpha: Number | None = Field(
        None,
        gt=0,
        description="weight w of a recurrence's output is alpha times the gate (default: expert 0.1, token 1; with "
        "update=step the value for which w = 1 at the start: sigmoid 2, softmax R)",
    )
    temperature: Number | None = Field(None, gt=0, description="the router sees the state divided by it (default: 1)")
    gate: Literal["sigmoid", "tanh", "softmax"] | None = Field(
        None, description="expert: sigmoid or tanh; token: softmax or sigmoid (default: the first)"
    )
    network: Literal["linear", "mlp"] | None = Field(None, description="network of the router (default: linear)")
    update: Literal["add", "step"] | None = Field(
        None,
        description="add: s + w core(s), as the paper's authors; step: s + w (core(s) - s), whose router starts at "
        "w = 1, so that the model starts as the recursion without a router (default: add)",
    )
    auxiliary: bool | None = Field(
        None, description="expert: routers of their own learn the choice, which thresholds then go by (default: no)"
    )
    kv: Literal["recursion-wise", "first-recursion"] | None = Field(
        None,
        description="keys and values at a recurrence: of the tokens that it runs, or the first recurrence's of all "
        "tokens (default: recursion-wise)",
    )
    inference: Literal["threshold", "topk"] | None = Field(
        None,
        description="expert, outside of training: threshold is causal; topk takes the capacity of the whole sequence, "
        "which no cache or server can do (default: threshold, but topk for imported checkpoints)",
    )
    thresholds: Thresholds | None = Field(
        None, description="expert: for each recurrence, the least sigmoid of a router's logit (default: 0.5)"
    )

    def unused(self) -> Iterator[Unused]:
        if self.inference == "topk":
            yield Unused("thresholds", ("inference",), "router.inference=topk takes the capacity, whatever they are")

    def fields(self, depths: int) -> dict[str, Any]:
        """The fields of the model's config, for a router of `depths` recurrences."""
        return {"kind": "expert", "depths": depths, **self.model_dump(exclude_none=True)}


class Exit(Section):
    """The exit rule that serving uses by default."""

    rule: ExitRule = Field(description="test after which a token exits; gate needs a model with an exit gate")
    threshold: Number | None = Field(None, description="threshold of the rule (default: the rule's own)")
    min_recurrences: Count = Field(1, description="recurrences before the rule may fire")

    def unused(self) -> Iterator[Unused]:
        if self.rule == "fixed":
            for name in ("threshold", "min_recurrences"):
                yield Unused(name, ("rule",), "exit.rule=fixed never fires; choose another rule")


class ConvertRecipe(Section):
    """The conversion of a source into a recurrent-depth model."""

    method: Literal["recursive", "retrofit", "mor", "universal", "fold"] | None = Field(
        None,
        description="recursive (arXiv 2410.20672) ties all layers; retrofit (2511.07384) recurs a core, and need not "
        "be named where sizes or layers are given; mor (2507.10524) is recursive with a router; universal (1807.03819) "
        "ties all layers into one; fold shares a block of layers that the source has several times, bit for bit; "
        "without any, a public recurrent checkpoint is imported",
    )
    loops: Depth | None = Field(None, description="recursive, mor: number of loops B; it divides the layers to be tied")
    sharing: Literal["cycle", "sequence", "middle-cycle", "middle-sequence"] | None = Field(
        None,
        description="recursive, mor: tied layers run one after the other, B times (cycle), or each B times in a row "
        "(sequence); middle- leaves the first and the last layer untied (default: cycle, but mor middle-cycle)",
    )
    init: Literal["stepwise", "average", "lower", "upper", "random"] | None = Field(
        None,
        description="start of tied layers: evenly spaced, averaged, the first or last source layers, or random "
        "(default: stepwise, but average with a LoRA by svd of a quarter of hidden_size or more)",
    )
    sizes: Integers | None = Field(None, description="retrofit: P,C,D, the numbers of prelude, core and coda layers")
    layers: Layers | None = Field(None, description="retrofit: explicit layers instead of sizes")
    influence: str | None = Field(
        None,
        description="retrofit, with sizes: a text file; the core takes the layers between prelude and coda that have "
        "most block influence (arXiv 2403.03853) on it, not the last of them",
    )
    lora: Lora | None = Field(None, description="relaxation of the tied layers")
    router: Router | None = Field(None, description="chooses the tokens of every recurrence (Mixture-of-Recursions)")
    injection: Literal["none", "add", "linear", "gated", "decayed"] | None = Field(
        None, description="how the prelude's output enters each recurrence (default: retrofit linear, recursive none)"
    )
    recurrence_norm: Annotated[bool | Literal["between"], BeforeValidator(_recurrence_norm)] = Field(
        False,
        description="true: an RMS norm after every recurrence, which one recurrence of the source does not have; "
        "between: the source's final norm between two recurrences, so R=1 is the source and states stay bounded",
    )
    recurrence_damping: Annotated[
        float | str, BeforeValidator(_damping, json_schema_input_type=Annotated[Number, Field(gt=0, le=1)] | Damping)
    ] = Field(
        1.0,
        description="g of s + g (core(s) - s), the new state of a recurrence: a number, or learned (starts at one "
        "half), after the first recurrence; 1/R for all of R recurrences; 1.0 for no damping. So R=1 is the source",
    )
    recurrence_residual: bool = Field(
        False, description="every recurrence but the first adds its input to its output (AbbIE-D, arXiv 2507.08567)"
    )
    recurrence_encoding: Literal["none", "sinusoidal"] | None = Field(
        None,
        description="position and recurrence, added to the state before every recurrence with a scale that starts at "
        "zero (default: universal sinusoidal, else none)",
    )
    halting: Literal["none", "act"] = Field(
        "none", description="act: tokens halt under a gate, and the mean of their states is read out (arXiv 1603.08983)"
    )
    state_init: Literal["input", "zeros", "normal"] | None = Field(
        None, description="initial state (default: input, but zeros with injection=add, so that R=1 is the source)"
    )
    state_std: Number = Field(0.0087, gt=0, description="scale of state_init=normal")
    num_recurrences: Depth | None = Field(
        None, description="R at inference (default: recursive loops, retrofit 4; fold has the source's)"
    )
    max_recurrences: Depth | None = Field(
        None, description="greatest R that can be served (default: num_recurrences, at least 8)"
    )
    kv_policy: str = Field(
        "per-depth",
        description="keys and values of recurrences: per-depth, last-exited (deeper ones of tokens that exit early are "
        "those of their exit), single, first, or modulo-k as modulo-4; all but per-depth change the results",
    )
    exit: Exit | None = Field(None, description="the exit rule that serving uses by default")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="type of the weights (default: the source's; of a GGUF file float32)"
    )
    dequantize: bool = Field(
        False,
        description="read a quantised source (fp8, mxfp8, mxfp4, bitsandbytes, compressed-tensors), tensor by tensor, "
        "into the type that its config names; GGUF files need no key",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub source (default: main)")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where averages and SVDs are computed")
    workers: Annotated[Count, Field(le=256)] = Field(
        1, description="processes that make tensors, each on its share of the cores; the output is the same"
    )
    seed: Integer = Field(
        0, ge=0, lt=2**63, description="seed of random layers, the normal initial state and the tokens used to verify"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ConvertRecipe:
        if self.method is None and (self.sizes is not None or self.layers is not None):
            self.method = "retrofit"
        if self.method == "fold":
            fields = type(self).model_fields
            if changed := [key for key in fields if key not in FOLD_KEYS and getattr(self, key) != fields[key].default]:
                raise ValueError(f"method=fold shares equal layers and changes nothing else: leave out {changed[0]}")
            return self
        if self.method == "mor":
            self.router = self.router or Router.model_validate({})
        if self.method in ("recursive", "mor", "universal"):
            if self.method == "universal" and self.loops is not None:
                raise ValueError("method=universal ties all layers into one: leave loops out, num_recurrences is free")
            if self.loops is None and self.method != "universal":
                raise ValueError(f"method={self.method} needs loops=B, the number of times that the tied layers run")
            for key in ("sizes", "layers", "influence"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} belongs to method=retrofit; method={self.method} takes loops and init")
        else:
            for key in ("loops", "sharing", "init"):
                if key in self.model_fields_set and getattr(self, key) is not None:
                    raise ValueError(f"{key} belongs to method=recursive; method=retrofit takes sizes or layers")
            if self.method and (self.sizes is None) == (self.layers is None):
                raise ValueError("method=retrofit needs either sizes=P,C,D or layers.prelude, layers.core, layers.coda")
            if self.sizes is not None and (len(self.sizes) != 3 or min(self.sizes) < 0 or self.sizes[1] == 0):
                raise ValueError(f"sizes={self.sizes}: three counts P,C,D, none negative, with at least one core layer")
            if self.influence is not None and self.sizes is None:
                raise ValueError("influence chooses layers for sizes=P,C,D, and layers are given: leave one out")
            if self.lora and self.lora.init == "svd":
                raise ValueError("lora.init=svd belongs to method=recursive: retrofit ties no two layers, use zero")
        if self.injection == "gated" and self.state_init in ("zeros", "normal"):
            raise ValueError(f"injection=gated keeps the source only from state_init=input, not {self.state_init}")
        if self.lora and self.lora.init == "svd" and self.init == "random":
            raise ValueError("lora.init=svd with init=random would approximate the source by noise; use lora.init=zero")
        return self

    def _computes(self) -> bool:
        """True where tensors are averaged or decomposed."""
        relaxed = self.lora is not None and (self.lora.dora or (self.lora.init != "zero" and self.method != "retrofit"))
        return self.init == "average" or relaxed

    def recorded(self) -> dict[str, Any]:
        """The keys that stand in the record of an output, as JSON: those that change its bytes."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"workers"})

    def settle_init(self, hidden_size: int) -> None:
        """Set `init` of tied layers where it is left out, by the rank of LoRA factors from an SVD: docs/negative.md."""
        if self.method in ("retrofit", "fold") or self.init is not None:
            return
        rank = max(self.lora.ranks().values()) if self.lora and self.lora.init != "zero" else 0
        self.init = "average" if rank >= AVERAGE_FROM * hidden_size else "stepwise"

    def unused(self) -> Iterator[Unused]:
        if self.device != "cpu" and not self._computes():
            why = "these tensors are copied; averages and SVDs (init=average, lora.rank) are computed on a device"
            yield Unused("device", ("method", "init", "lora"), why)
        if self.state_init != "normal":
            yield Unused("state_std", ("state_init",), "it is the scale of state_init=normal, which is not asked for")
        if self.exit:
            if self.router:
                why = "tokens of a model with a router have the depths of the router"
                yield Unused("exit.rule", ("method", "router"), why)
            elif self.sharing in ("sequence", "middle-sequence"):
                why = f"sharing={self.sharing} has no recurrence of the whole core, after which to exit"
                yield Unused("exit.rule", ("sharing",), why)
