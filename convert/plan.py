"""The plan of a conversion: the source layers that each layer of the new model is made from. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import UserError
from .recipe import ConvertRecipe

PARTS = ("prelude", "core", "coda")  # parts of a recurrent-depth model, in the order in which they run


@dataclass(frozen=True)
class Plan:
    """Source layers of each part of the new model, and the fields of RecurrentDepthConfig that the method decides.

    prelude, core, coda: source-layer ids, each naming the layer whose structure stands there.
    parents: for each part, the source layers whose mean is the weight of layer n. One parent is copied; a layer without
        parents starts at random.
    stands_for: the source layer that core layer n replaces at depth d, as `stands_for[d][n]`.
    sharing: the order in which the core's layers run, see RecurrentDepthConfig.
    """

    prelude: list[int]
    core: list[int]
    coda: list[int]
    parents: dict[str, list[list[int]]]
    stands_for: list[list[int]]
    sharing: str
    injection: str
    recurrence_norm: str
    recurrence_damping: float | str
    recurrence_residual: bool
    recurrence_encoding: str
    halting: str
    state_init: str
    num_recurrences: int

    def dropped(self, count: int) -> list[int]:
        """The source layers, of `count`, from which no layer is made."""
        kept = {layer for part in self.parents.values() for layers in part for layer in layers}
        return [layer for layer in range(count) if layer not in kept]


class Layers(NamedTuple):
    """The layers of a plan: see the fields of `Plan` by these names. parts: prelude, core and coda."""

    parts: dict[str, list[int]]
    parents: dict[str, list[list[int]]]
    stands_for: list[list[int]]
    sharing: str = "cycle"


def make_plan(
    recipe: ConvertRecipe, kinds: list[str], influence: Callable[[], list[float]], folded: Layers | None = None
) -> Plan:
    """The plan for a source whose layers are of these `kinds` (see `layer_kinds`).

    `influence()` measures the block influence of every layer, and is called where the recipe asks for it. With method
    fold, the layers are `folded`. Raises UserError for layers that the source lacks, and for layers of different kinds
    that would be tied.
    """
    sharing = recipe.sharing or ("middle-cycle" if recipe.method == "mor" else "cycle")
    retrofit = recipe.method == "retrofit"
    if folded is None:
        layers = _retrofit(recipe, len(kinds), influence) if retrofit else _recursive(recipe, sharing, kinds)
    else:
        layers, sharing = folded, folded.sharing
    injection = recipe.injection or ("linear" if retrofit else "none")
    depths = recipe.num_recurrences or len(layers.stands_for) or 4
    encoding = "sinusoidal" if recipe.method == "universal" else "none"
    return Plan(
        **layers.parts,
        parents=layers.parents,
        stands_for=layers.stands_for or [layers.parts["core"]] * depths,
        sharing=sharing.removeprefix("middle-"),
        injection=injection,
        recurrence_norm="between"
        if recipe.recurrence_norm == "between"
        else "each"
        if recipe.recurrence_norm
        else "none",
        recurrence_damping=recipe.recurrence_damping,
        recurrence_residual=recipe.recurrence_residual,
        recurrence_encoding=recipe.recurrence_encoding or encoding,
        halting=recipe.halting,
        state_init=recipe.state_init or ("zeros" if injection == "add" else "input"),
        num_recurrences=depths,
    )


def _recursive(recipe: ConvertRecipe, sharing: str, kinds: list[str]) -> Layers:
    """Layers of recursive transformers (arXiv 2410.20672, section 2.2; 2507.10524, table 1).

    `cycle` makes source layer l tied layer l mod K, `sequence` tied layer l // B: of all layers, or of those in the
    middle. A universal transformer (arXiv 1807.03819) has K = 1.
    """
    middle = sharing.startswith("middle")
    tied = list(range(len(kinds)))[1:-1] if middle else list(range(len(kinds)))
    loops = recipe.loops or max(len(tied), 1)  # a universal transformer has as many as layers
    if not tied or len(tied) % loops:
        fitting = ", ".join(str(b) for b in range(1, len(tied) + 1) if len(tied) % b == 0) or "none"
        which = f"{len(tied)} layers between the first and the last" if middle else f"{len(tied)} layers"
        raise UserError(f"loops={loops} does not divide the source's {which}; choose from {fitting}")
    width = len(tied) // loops
    if "sequence" in sharing:
        groups = [tied[n * loops : (n + 1) * loops] for n in range(width)]
    else:
        groups = [tied[n::width] for n in range(width)]
    _check_kinds(recipe, loops, sharing, groups, kinds)
    core, parents = _tied_layers(recipe, groups, tied, kinds)
    ends = {"prelude": [0] if middle else [], "coda": [len(kinds) - 1] if middle else []}
    return Layers(
        {**ends, "core": core},
        {name: [[layer] for layer in layers] for name, layers in ends.items()} | {"core": parents},
        [[group[depth] for group in groups] for depth in range(loops)],
    )


def _check_kinds(recipe: ConvertRecipe, loops: int, sharing: str, groups: list[list[int]], kinds: list[str]) -> None:
    """Raise UserError for a group of layers that would be tied and are not all of one kind."""
    for group in groups:
        first = {kinds[layer]: layer for layer in reversed(group)}  # the first layer of each kind
        if len(first) < 2:
            continue
        found = ", ".join(f"{layer} {kind}" for kind, layer in sorted(first.items(), key=lambda item: item[1]))
        setting, way_out = f"loops={loops}, sharing={sharing}", "choose other loops"
        if recipe.method == "universal":
            setting, way_out = "method=universal", "use method=recursive with loops that keep them apart"
        raise UserError(f"{setting} ties layers of different attention types or structure ({found}); {way_out}")


def _tied_layers(
    recipe: ConvertRecipe, groups: list[list[int]], tied: list[int], kinds: list[str]
) -> tuple[list[int], list[list[int]]]:
    """The core's source-layer ids and the parents of its layers, one for each group of layers that are tied."""
    if recipe.init == "average":
        return [group[0] for group in groups], groups
    if recipe.init == "random":
        return [group[0] for group in groups], [[] for _ in groups]
    assert recipe.init is not None, "settle_init comes before"
    core = [_start(recipe.init, n, len(groups), tied, kinds, kinds[group[0]]) for n, group in enumerate(groups)]
    return core, [[layer] for layer in core]


def _start(init: str, n: int, width: int, tied: list[int], kinds: list[str], kind: str) -> int:
    """The source layer that the n-th of `width` tied layers starts as: of this kind, the one nearest to its place.

    `stepwise` takes evenly spaced places, first and last included, `lower` the first places, `upper` the last.
    """
    evenly = round(n * (len(tied) - 1) / max(width - 1, 1))
    place = {"stepwise": evenly, "lower": n, "upper": len(tied) - width + n}[init]
    return min((layer for layer in tied if kinds[layer] == kind), key=lambda layer: abs(layer - tied[place]))


def _retrofit(recipe: ConvertRecipe, count: int, influence: Callable[[], list[float]]) -> Layers:
    """Layers of retrofitted recurrence (arXiv 2511.07384): explicit ones, or by size.

    By size, the core is the layers before the coda, or those of greatest influence. At every depth the core stands for
    itself, so `stands_for` is empty.
    """
    if recipe.layers is not None:
        parts = {"prelude": recipe.layers.prelude, "core": recipe.layers.core, "coda": recipe.layers.coda}
        for name, layers in parts.items():
            for layer in layers:
                if not 0 <= layer < count:
                    raise UserError(f"layers.{name} names layer {layer}; the source has layers 0 to {count - 1}")
        if not parts["core"]:
            raise UserError("layers.core is empty; name at least one source layer to recur")
    else:
        p, c, d = recipe.sizes or (0, 0, 0)
        if p + c + d > count:
            raise UserError(f"sizes={p},{c},{d} need {p + c + d} layers; the source has {count}")
        core = list(range(count - d - c, count - d))
        if recipe.influence is not None:
            measured = influence()
            core = sorted(sorted(range(p, count - d), key=lambda layer: -measured[layer])[:c])
        parts = {"prelude": list(range(p)), "core": core, "coda": list(range(count - d, count))}
    return Layers(parts, {name: [[layer] for layer in layers] for name, layers in parts.items()}, [])
