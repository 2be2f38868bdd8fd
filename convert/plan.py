"""The plan of a conversion: which source layers each layer of the new model is made from. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UserError
from .recipe import ConvertRecipe


@dataclass(frozen=True)
class Plan:
    """`prelude`, `core`, `coda` are source-layer ids, giving structure; `parents[part][n]` are the source layers whose
    mean is the weight of layer n of that part (one parent: a copy; none: random).

    `stands_for[d][n]` is the source layer that core layer n replaces at depth d; `sharing` the order in which the
    core's layers run (see RecurrentDepthConfig).
    """

    prelude: list[int]
    core: list[int]
    coda: list[int]
    parents: dict[str, list[list[int]]]
    stands_for: list[list[int]]
    sharing: str
    injection: str
    recurrence_norm: str
    recurrence_residual: bool
    recurrence_encoding: str
    halting: str
    state_init: str
    num_recurrences: int

    def dropped(self, count: int) -> list[int]:
        """Source layers, of `count`, that nothing is made from."""
        kept = {layer for part in self.parents.values() for layers in part for layer in layers}
        return [layer for layer in range(count) if layer not in kept]


def make_plan(recipe: ConvertRecipe, kinds: list[str], influence: Callable[[], list[float]]) -> Plan:
    """The plan for a source whose layers are of these kinds; `influence()` measures theirs. Raises UserError where that
    cannot be."""
    sharing = recipe.sharing or ("middle-cycle" if recipe.method == "mor" else "cycle")
    if recipe.method == "retrofit":
        parts, parents, stands_for = _retrofit(recipe, len(kinds), influence)
    else:
        parts, parents, stands_for = _recursive(recipe, sharing, kinds)
    injection = recipe.injection or ("linear" if recipe.method == "retrofit" else "none")
    depths = recipe.num_recurrences or (len(stands_for) if stands_for else 4)
    encoding = "sinusoidal" if recipe.method == "universal" else "none"
    return Plan(
        prelude=parts["prelude"],
        core=parts["core"],
        coda=parts["coda"],
        parents=parents,
        stands_for=stands_for or [parts["core"]] * depths,
        sharing=sharing.removeprefix("middle-"),
        injection=injection,
        recurrence_norm="each" if recipe.recurrence_norm else "none",
        recurrence_residual=recipe.recurrence_residual,
        recurrence_encoding=recipe.recurrence_encoding or encoding,
        halting=recipe.halting,
        state_init=recipe.state_init or ("zeros" if injection == "add" else "input"),
        num_recurrences=depths,
    )


def _recursive(recipe: ConvertRecipe, sharing: str, kinds: list[str]) -> tuple:
    """Tying of recursive transformers (arXiv 2410.20672, section 2.2; 2507.10524, table 1): `cycle` makes source layer
    l tied layer l mod K, `sequence` tied layer l // B, both of all layers or of those in the middle. A universal
    transformer (1807.03819) has K = 1."""
    middle = sharing.startswith("middle")
    tied = list(range(len(kinds)))[1:-1] if middle else list(range(len(kinds)))
    loops = recipe.loops or max(len(tied), 1)  # universal: as many as there are layers, so that they become one
    if not tied or len(tied) % loops:
        fitting = ", ".join(str(b) for b in range(1, len(tied) + 1) if len(tied) % b == 0) or "none"
        which = f"{len(tied)} layers between the first and the last" if middle else f"{len(tied)} layers"
        raise UserError(f"loops={loops} does not divide the source's {which}; choose from {fitting}")
    width = len(tied) // loops
    if "sequence" in sharing:
        groups = [tied[n * loops : (n + 1) * loops] for n in range(width)]
    else:
        groups = [tied[n::width] for n in range(width)]
    for group in groups:
        first = {kinds[layer]: layer for layer in reversed(group)}  # of each kind
        if len(first) > 1:
            shown = ", ".join(f"{layer} {kind}" for kind, layer in sorted(first.items(), key=lambda item: item[1]))
            what, out = f"loops={loops}, sharing={sharing}", "choose other loops"
            if recipe.method == "universal":
                what, out = "method=universal", "use method=recursive with loops that keep them apart"
            raise UserError(f"{what} ties layers of different attention types or structure ({shown}); {out}")
    if recipe.init in ("average", "random"):
        core = [group[0] for group in groups]
        parents = groups if recipe.init == "average" else [[] for _ in groups]
    else:
        assert recipe.init is not None, "settle_init has set it"
        core = [_start(recipe.init, n, width, tied, kinds, kinds[group[0]]) for n, group in enumerate(groups)]
        parents = [[layer] for layer in core]
    ends = {"prelude": [0] if middle else [], "coda": [len(kinds) - 1] if middle else []}
    stands_for = [[group[depth] for group in groups] for depth in range(loops)]
    return (
        {**ends, "core": core},
        {name: [[layer] for layer in layers] for name, layers in ends.items()} | {"core": parents},
        stands_for,
    )


def _start(init: str, n: int, width: int, tied: list[int], kinds: list[str], kind: str) -> int:
    """The source layer that the n-th of `width` tied layers starts as: `stepwise` takes evenly spaced ones, first and
    last kept, `lower` the first, `upper` the last; of those of this kind, the nearest."""
    place = {"stepwise": round(n * (len(tied) - 1) / max(width - 1, 1)), "lower": n, "upper": len(tied) - width + n}[
        init
    ]
    return min((layer for layer in tied if kinds[layer] == kind), key=lambda layer: abs(layer - tied[place]))


def _retrofit(recipe: ConvertRecipe, count: int, influence: Callable[[], list[float]]) -> tuple:
    """Prelude, core and coda of retrofitted recurrence (arXiv 2511.07384): the core ends where the coda begins, or
    takes the layers of most influence."""
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
    return parts, {name: [[layer] for layer in layers] for name, layers in parts.items()}, None
