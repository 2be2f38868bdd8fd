"""Configuration of a recurrent-depth model: the source's own config, and the layers of it that recur."""

from __future__ import annotations

import os
from dataclasses import field
from typing import Any, ClassVar, cast

from transformers import AutoConfig, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs  # pyright: ignore[reportUnknownVariableType]

from .configuration_fields import EXIT_FIELDS, FORMAT_VERSION, check_kinds, check_version, is_number
from .configuration_router import router_fields
from .configuration_source import KEYS_ALONE, clear_source_settings, declares, keeps_keys, source_config_of

STATE_INITS = ("input", "zeros", "normal")
INJECTIONS = ("none", "add", "linear", "gated", "decayed", "diagonal")
SHARINGS = ("cycle", "sequence")
NORMS = ("none", "each", "between", "last")
INVERSE_DEPTH, LEARNED, SELECTIVE = "1/R", "learned", "selective"
DAMPINGS = (INVERSE_DEPTH, LEARNED, SELECTIVE)  # values of recurrence_damping beside numbers
ENCODINGS = ("none", "sinusoidal")
HALTINGS = ("none", "act")
GATE_NORMS = ("final", "own")
EXIT_RULES = (
    "fixed", "latent-diff", "cosine", "gate", "entropy-diff", "kl", "minp-kl", "argmax-stability",
)  # fmt: skip
KV_POLICIES = ("per-depth", "last-exited", "single", "first", "modulo-k, such as modulo-4")


class RecurrentDepthConfig(PreTrainedConfig):
    r"""
    Args:
        source_config (`PreTrainedConfig` or `dict`): configuration of the source architecture, with all its layers.
        format_version (`int`): version of the format of these fields. A config without it has version 1. ValueError
            for a version above the known one.
        prelude, core, coda (`list[int]`): source-layer ids. Each names the layer whose structure (attention type,
            window, rotary variant) stands at that place. The prelude and the coda run once, the core runs R times.
        num_recurrences (`int`): R of a call without `num_recurrences`.
        max_recurrences (`int`): depth for which a served key-value cache has slots; 0 means max(8, num_recurrences).
        state_init (`str`): `input` (s_0 = e, the prelude's output), `zeros`, or `normal` (truncated normal noise that
            depends on seed, sequence, position and channel alone).
        state_std (`float`), state_seed (`int`): scale and seed of the `normal` state; it is cut at three `state_std`.
        injection (`str`): how e enters each recurrence: `none` (s), `add` (s + e), `linear` (W [s, e]),
            `gated` (g s + (1 - g) e), `decayed` (a s + (1 - a) W e, with a factor a < 1 for each channel) or
            `diagonal` (Parcae's: the same in other parameters). See `injection.py`.
        prelude_norm (`bool`): an RMS norm of the prelude's output gives e.
        state_projection (`bool`): the coda reads W s_R, with a matrix W (Parcae, arXiv 2604.12946).
        sharing (`str`): order of the core's layers: `cycle` (all layers, R times) or `sequence` (each layer R times,
            then the next; without injection only).
        recurrence_norm (`str`): `none`; `each` (an added RMS norm after every recurrence); `between` (the source's
            final norm between two recurrences, as in Ouro); or `last` (the source's final norm after the last one,
            before the coda, as in Huginn).
        recurrence_damping (`float` or `str`): g of s_r = s_{r-1} + g (core(inject(s_{r-1}, e)) - s_{r-1}); 1.0 is no
            damping. A number below 1, or `learned` (a g for each channel), damps the recurrences after the first; `1/R`
            damps all by the call's R. So one recurrence is never damped. `selective` damps all, by a g of each token
            and channel that depends on the step (LoopUS, arXiv 2605.11011). The recurrence norm `each` norms the damped
            state; with `between`, s_{r-1} is the normed state. See `damping.py`.
        recurrence_residual (`bool`): every recurrence but the first adds its input to its output (AbbIE-D,
            arXiv 2507.08567).
        recurrence_encoding (`str`): `none`, or `sinusoidal` (position and recurrence, scaled, before every recurrence:
            Universal Transformers).
        time_conditioning (`dict`, *optional*): factors on outputs of the core's modules that depend on r / R and 1 / R
            (LoopFormer, arXiv 2602.11451): `scale`, `gate` (`list[str]`, names of modules), `frequencies` (`int`). See
            `time_conditioning.py`.
        halting (`str`): `none`, or `act` (adaptive computation time): tokens halt one by one under a gate, and the
            read-out is the mean of the states, weighted by the gate. See `halting.py`.
        halting_epsilon (`float`): a token halts once its halting probabilities sum to 1 - epsilon.
        exit_gate (`bool`): a linear gate on the normed state gives the probability to exit (Ouro).
        exit_gate_norm (`str`): the norm of the exit gate: `final` (the source's) or `own` (a LayerNorm, as in LoopUS).
        relaxation (`dict`, *optional*): parameters of the core's layers that differ between depths: `depths` (`int`),
            `rank` (`dict[str, int]`, LoRA ranks by names of linear modules), `own` (`list[str]`, names of parameters),
            `dora` (`bool`). See `relaxation.py`.
        router (`dict`, *optional*): Mixture-of-Recursions: the choice of the tokens of a recurrence. See
            `router_fields`; `depths` defaults to num_recurrences.
        kv_policy (`str`): keys and values that a recurrence reads and writes: `per-depth` (its own), `last-exited` (its
            own; a position that exited earlier keeps its last ones), `single` (one slot, overwritten), `first` (those
            of the first recurrence) or `modulo-k` (depth mod k).
        exit (`dict`, *optional*): the exit rule that serving uses by default: `rule`, `threshold`, `min_recurrences`.
        trained_recurrences (`dict`, *optional*): the numbers of recurrences in training: `mean`, `min`, `max`. None
            where they are unknown.
        bos_token_id, eos_token_id, pad_token_id: default to the source's.

    Attributes that this config lacks (`hidden_size`, `num_attention_heads`, ...) are those of `source_config` that its
    class declares. Other fields of a source's config.json describe its own files, and stay there.

    Raises ValueError, naming the value and the rule, where the fields contradict each other; `save_pretrained` too.
    """

    model_type = "recurrent_depth"
    sub_configs: ClassVar[dict[str, Any]] = {"source_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "past_key_values", "last_state", "states", "depth_logits", "depth_losses", "router_outputs",
    ]  # fmt: skip

    source_config: PreTrainedConfig = None  # pyright: ignore[reportAssignmentType] - as transformers' empty config
    format_version: int = 1  # version of a config.json without the field
    prelude: list[int] = field(default_factory=list[int])
    core: list[int] = field(default_factory=list[int])
    coda: list[int] = field(default_factory=list[int])
    num_recurrences: int = 1
    max_recurrences: int = 0
    state_init: str = "input"
    state_std: float = 0.0087
    state_seed: int = 0
    injection: str = "none"
    prelude_norm: bool = False
    state_projection: bool = False
    sharing: str = "cycle"
    recurrence_norm: str = "none"
    recurrence_damping: float | str = 1.0
    recurrence_residual: bool = False
    recurrence_encoding: str = "none"
    time_conditioning: dict[str, Any] | None = None
    halting: str = "none"
    halting_epsilon: float = 0.01
    exit_gate: bool = False
    exit_gate_norm: str = "final"
    relaxation: dict[str, Any] | None = None
    router: dict[str, Any] | None = None
    kv_policy: str = "per-depth"
    exit: dict[str, Any] | None = None
    trained_recurrences: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_version(self.format_version)
        self.format_version = FORMAT_VERSION
        given: Any = self.source_config
        self.source_config = None  # pyright: ignore[reportAttributeAccessIssue] - the base class takes over no field
        source: PreTrainedConfig | None = given
        if isinstance(given, dict):
            source = source_config_of(cast("dict[str, Any]", given))
        self._complete()
        super().__post_init__(**kwargs)  # pyright: ignore[reportUnknownMemberType]
        if source is None:  # transformers builds an empty config to compute differences
            return
        self.source_config = source
        clear_source_settings(source)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # generation reads them from the saved fields
            if getattr(self, name) is None:
                setattr(self, name, getattr(source, name, None))
        if self._attn_implementation is not None:
            source._attn_implementation = self._attn_implementation
        self._check()

    @property
    def _attn_implementation(self) -> str | None:
        """The attention of all layers, which are the source's: a value for `source_config` alone is one for both."""
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, value: str | dict[str, str] | None
    ) -> None:
        _set_implementation(self, "_attn_implementation", value)

    @property
    def _experts_implementation(self) -> str | None:
        """As `_attn_implementation`, for the computation of experts."""
        return self._experts_implementation_internal

    @_experts_implementation.setter
    def _experts_implementation(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, value: str | dict[str, str] | None
    ) -> None:
        _set_implementation(self, "_experts_implementation", value)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write config.json into `save_directory`, as transformers does. The fields are checked first, as on loading.

        Raises ValueError, naming the value and the rule, for fields that could not be loaded.
        """
        self._check()
        super().save_pretrained(save_directory, *args, **kwargs)  # pyright: ignore[reportUnknownMemberType]

    def validate(self) -> None:
        """transformers' checks of any config, but for that of per-layer lists, which are the source's to check: here
        `layer_types` has an entry a slot. Raises ValueError."""
        checks: Any = getattr(type(self), "__class_validators__", ())
        for check in checks:
            if check.__name__ != "validate_layer_type":
                check(self)

    def _complete(self) -> None:
        """Set the fields whose default follows from others."""
        if self.router:
            self.router = router_fields({"depths": self.num_recurrences, **self.router})
        if not self.max_recurrences:
            self.max_recurrences = default_max_recurrences(self.num_recurrences, self.router)

    def _check(self) -> None:
        """Raise ValueError, naming the value and the rule, for the first field that is wrong."""
        if not isinstance(self.source_config, PreTrainedConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"source_config={self.source_config!r}: the config of the source architecture")
        check_version(self.format_version)
        check_kinds(self)
        self._complete()
        self._check_layers()
        choices = {"state_init": STATE_INITS, "injection": INJECTIONS, "sharing": SHARINGS, "recurrence_norm": NORMS}
        choices |= {"recurrence_encoding": ENCODINGS, "halting": HALTINGS, "exit_gate_norm": GATE_NORMS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose from {', '.join(allowed)}")
        damping = self.recurrence_damping
        if damping not in DAMPINGS and not (is_number(damping) and 0 < damping <= 1):
            named = ", ".join(DAMPINGS)
            raise ValueError(f"recurrence_damping={damping!r}: a number above 0, at most 1; or one of {named}")
        self._check_between()
        self.kv_slots(1)
        self._check_states()
        if self.kv_policy != "per-depth" and (self.router or self.sharing == "sequence"):
            raise ValueError(
                f"kv_policy={self.kv_policy!r}: with a router (see router.kv) or sharing='sequence' it is 'per-depth'"
            )
        if self.exit is not None:
            self._check_exit(self.exit)

    @property
    def depends_on_recurrences(self) -> bool:
        """True where the state of a depth depends on R of the call: a run at R is not the start of one at more."""
        return self.recurrence_damping == "1/R" or bool(self.time_conditioning)

    def _check_layers(self) -> None:
        """Raise ValueError unless all places name layers of the source, and the depths are in order."""
        count = self.source_config.num_hidden_layers
        for name in ("prelude", "core", "coda"):
            for layer in getattr(self, name):
                if not 0 <= layer < count:
                    raise ValueError(f"{name} names source layer {layer}; the source has layers 0 to {count - 1}")
        if not self.core:
            raise ValueError("core is empty; name at least one source layer to recur")
        if self.num_recurrences < 1 or self.max_recurrences < self.num_recurrences:
            raise ValueError(
                f"num_recurrences={self.num_recurrences}, max_recurrences={self.max_recurrences}: "
                "need 1 <= num_recurrences <= max_recurrences"
            )

    def _check_between(self) -> None:
        """Raise ValueError where initial state, sharing, router and the steps between two recurrences contradict."""
        if self.injection == "none" and self.state_init != "input":
            raise ValueError(
                f"state_init={self.state_init!r} with injection='none' never shows the input to the core; "
                "use state_init='input', or injection 'add' or 'linear'"
            )
        if self.router and (self.sharing == "sequence" or self.max_recurrences != self.router["depths"]):
            raise ValueError(
                f"sharing={self.sharing!r}, max_recurrences={self.max_recurrences} with a router of "
                f"{self.router['depths']} recurrences: it needs sharing='cycle', and max_recurrences equal to them"
            )
        between = {
            "injection": self.injection != "none",
            "recurrence_norm": self.recurrence_norm != "none",
            "recurrence_damping": self.recurrence_damping != 1,
            "recurrence_residual": self.recurrence_residual,
            "recurrence_encoding": self.recurrence_encoding != "none",
            "time_conditioning": bool(self.time_conditioning),
            "halting": self.halting != "none",
        }
        if self.sharing == "sequence" and any(between.values()):
            raise ValueError(
                "sharing='sequence' runs no recurrence of the whole core, so nothing can stand between two of them: "
                f"{', '.join(name for name, there in between.items() if there)} cannot"
            )
        if self.router and self.recurrence_norm == "between":  # norms of all tokens, also of those that have stopped
            raise ValueError("recurrence_norm='between' goes with no router: choose from none, each, last")
        alone = ("recurrence_residual", "recurrence_encoding", "time_conditioning", "halting")
        if self.router and any(between[name] for name in alone):
            raise ValueError(f"a router goes with no {', '.join(alone[:-1])} or {alone[-1]}")
        if self.time_conditioning and self.relaxation:
            raise ValueError("time_conditioning goes with no relaxation: both change the layers of a depth")
        if self.router and any(getattr(self.source_config, "value_embeddings", ())):
            raise ValueError("a router goes with no value_embeddings, which layers look up for all tokens")
        if self.recurrence_damping != 1 and (self.router or self.recurrence_residual):
            raise ValueError(
                f"recurrence_damping={self.recurrence_damping!r} goes with no router, whose weights take its place "
                "(router.update='step'), and with no recurrence_residual, which adds the state before as a whole"
            )

    def _check_states(self) -> None:
        """Raise ValueError where a state, or an indexer's keys, would be shared or left out as keys and values can."""
        types = get_layer_types_and_kwargs(self.source_config)[0]
        kinds = {types[layer]: layer for layer in reversed(self.slots(1))}
        more = ", ".join(f"{layer} {kind}" for kind, layer in kinds.items() if kind not in KEYS_ALONE)
        if more and (self.router or self.kv_policy not in ("per-depth", "last-exited")):
            setting = "a router" if self.router else f"kv_policy={self.kv_policy!r}"
            raise ValueError(
                f"{setting}: layers of other types than {', '.join(KEYS_ALONE)} ({more}) keep more than keys and "
                "values for each depth, and no token may be left out; choose no router, and kv_policy='per-depth'"
            )
        if not any(keeps_keys(kind) for kind in kinds):
            raise ValueError(
                f"prelude, core and coda have no attention layer ({more}), and a cache counts its positions by one; "
                "choose layers with one among them"
            )

    def _check_exit(self, exit: dict[str, Any]) -> None:
        """Raise ValueError unless `exit` is an exit rule that this model can use."""
        if exit.keys() - EXIT_FIELDS.keys() or exit.get("rule") not in EXIT_RULES:
            raise ValueError(f"exit={exit}: a rule of {', '.join(EXIT_RULES)}, threshold, min_recurrences")
        if exit["rule"] == "gate" and not self.exit_gate:
            raise ValueError(f"exit={exit}: this model has no exit gate; choose another rule")
        if not is_number(exit.get("threshold") or 0):
            raise ValueError(f"exit={exit}: threshold is a finite number")
        least = exit.get("min_recurrences", 1)
        if not isinstance(least, int) or not 1 <= least <= self.max_recurrences:
            raise ValueError(f"exit={exit}: min_recurrences is 1 to max_recurrences={self.max_recurrences}")

    def __getattr__(self, name: str) -> Any:
        source: PreTrainedConfig | None = None if name.startswith("_") else self.__dict__.get("source_config")
        own = getattr(source, "per_layer_attributes", None) or ()  # those that differ between layers have no one value
        if source is None or name in own or not declares(type(source), name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(source, name)

    def kv_slots(self, num_recurrences: int) -> int:
        """Number of key-value slots of a core layer at this depth. Raises ValueError for an unknown `kv_policy`."""
        if self.router and self.router["kv"] == "first-recursion":
            return 1
        return policy_slots(self.kv_policy, num_recurrences)

    @property
    def vocab_size(self) -> int:
        """The source's vocabulary size. `resize_token_embeddings` sets it."""
        return self.source_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.source_config.vocab_size = value

    @property
    def norm_eps(self) -> float:
        """Epsilon of the recurrence norm: the source's."""
        names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
        return next((eps for name in names if (eps := getattr(self.source_config, name, None))), 1e-6)

    @property
    def initializer_std(self) -> float:
        """Standard deviation of a router's initial weights: the source's."""
        return getattr(self.source_config, "initializer_range", None) or 0.02

    @property
    def num_hidden_layers(self) -> int:
        """Number of key-value slots: prelude, coda, then the core once for each of `max_recurrences` depths."""
        return len(self.slots(self.max_recurrences)) + self.has_choice_slot

    @property
    def has_choice_slot(self) -> bool:
        """True where a cache has one more slot, after all others: it holds the depths at which a token has keys."""
        return bool(self.router) and self.router["kv"] == "recursion-wise"

    @property
    def layer_types(self) -> list[str]:
        """Attention type of each key-value slot. Raises AttributeError for a source without several types."""
        types = self.source_config.layer_types if not self.has_choice_slot else None
        if types is None:
            types = get_layer_types_and_kwargs(self.source_config)[0]
        return [types[layer] for layer in self.slots(self.max_recurrences)] + ["full_attention"] * self.has_choice_slot

    def order(self, num_recurrences: int) -> list[tuple[str, int, int]]:
        """(part, layer in the part, depth counted from 0) of every layer that runs, in order."""
        core = [("core", n, depth) for depth in range(num_recurrences) for n in range(len(self.core))]
        if self.sharing == "sequence":
            core.sort(key=lambda place: place[1])
        prelude, coda = ([(part, n, 0) for n in range(len(getattr(self, part)))] for part in ("prelude", "coda"))
        return [*prelude, *core, *coda]

    def slots(self, num_recurrences: int) -> list[int]:
        """The source-layer id of every key-value slot: prelude, coda, then core by depth.

        The core comes last, so a call at another depth finds every shallower slot at the same place.
        """
        return self.prelude + self.coda + self.core * self.kv_slots(num_recurrences)


def _set_implementation(config: RecurrentDepthConfig, name: str, value: str | dict[str, str] | None) -> None:
    """Set `name` of `config`, and of its source's, by transformers' setter. Of a dict by sub-config, the source's value
    counts, else that of "", the whole."""
    if isinstance(value, dict):
        value = value.get("source_config", value.get("", getattr(config, name, None)))
    getattr(PreTrainedConfig, name).fset(config, value)


def policy_slots(policy: str, num_recurrences: int) -> int:
    """Number of key-value slots of a core layer under a KV `policy`, at this depth. Raises ValueError, naming the
    choices, for an unknown policy."""
    if policy in ("per-depth", "last-exited"):
        return num_recurrences
    if policy in ("single", "first"):
        return 1
    name, _, count = str(policy).partition("-")
    if name != "modulo" or not count.isdecimal() or not int(count):
        raise ValueError(f"kv_policy={policy!r}: choose from {', '.join(KV_POLICIES)}")
    return min(int(count), num_recurrences)


def default_max_recurrences(num_recurrences: int, router: dict[str, Any] | None) -> int:
    """The greatest depth of a served request, for a model that names none."""
    return router["depths"] if router else max(8, num_recurrences)
