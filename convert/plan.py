"""The plan of a conversion: which source layers each layer of the new model is made from. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from .recipe import ConvertRecipe


@dataclass(frozen=True)
class Plan:
    """`prelude`, `core`, `coda` are source-layer ids, giving structure; `parents[part][n]` are the source layers whose
    mean is the weight of layer n of that part (one parent: a copy)."""

    prelude: list[int]
    core: list[int]
    coda: list[int]
    parents: dict[str, list[list[int]]]
    injection: str
    state_init: str
    num_recurrences: int

    def dropped(self, count: int) -> list[int]:
        """Source layers, of `count`, that nothing is made from."""
        kept = {layer for part in self.parents.values() for layers in part for layer in layers}
        return [layer for layer in range(count) if layer not in kept]


def make_plan(recipe: ConvertRecipe, types: list[str]) -> Plan:
    """The plan for a source whose layers have attention types `types`. Raises UserError where that cannot be."""
    make = _recursive if recipe.method == "recursive" else _retrofit
    prelude, core, coda, parents = make(recipe, types)
    injection = recipe.injection or ("none" if recipe.method == "recursive" else "linear")
    state_init = recipe.state_init or ("zeros" if injection == "add" else "input")
    return Plan(
        prelude=prelude,
        core=core,
        coda=coda,
        parents=parents,
        injection=injection,
        state_init=state_init,
        num_recurrences=recipe.num_recurrences or recipe.loops or 4,
    )


def _recursive(recipe: ConvertRecipe, types: list[str]) -> tuple:
    """CYCLE tying of recursive transformers (arXiv 2410.20672, section 2.2): layer l becomes tied layer l mod K."""
    count, loops = len(types), recipe.loops or 0
    if loops < 1 or count % loops:
        fitting = ", ".join(str(b) for b in range(1, count + 1) if count % b == 0)
        raise UserError(f"loops={loops} does not divide the source's {count} layers; choose from {fitting}")
    tied = count // loops
    groups = [list(range(j, count, tied)) for j in range(tied)]
    for group in groups:
        if len({types[layer] for layer in group}) > 1:
            shown = ", ".join(f"{layer} {types[layer]}" for layer in group)
            raise UserError(f"loops={loops} ties layers of different attention types ({shown}); choose other loops")
    if recipe.init == "average":
        return [], list(range(tied)), [], {"prelude": [], "core": groups, "coda": []}
    core = [
        group[0] if recipe.init == "lower" else _stepwise(j, tied, types, types[group[0]])
        for j, group in enumerate(groups)
    ]
    return [], core, [], {"prelude": [], "core": [[layer] for layer in core], "coda": []}


def _stepwise(j: int, tied: int, types: list[str], wanted: str) -> int:
    """The j-th of `tied` evenly spaced source layers, first and last kept; nearest of attention type `wanted`."""
    even = j * (len(types) - 1) // max(tied - 1, 1)
    return min((layer for layer, kind in enumerate(types) if kind == wanted), key=lambda layer: abs(layer - even))


def _retrofit(recipe: ConvertRecipe, types: list[str]) -> tuple:
    """Prelude, core and coda of retrofitted recurrence (arXiv 2511.07384): the core ends where the coda begins."""
    count = len(types)
    if recipe.layers is not None:
        chosen = [recipe.layers.prelude, recipe.layers.core, recipe.layers.coda]
        for name, layers in zip(("prelude", "core", "coda"), chosen, strict=True):
            for layer in layers:
                if not 0 <= layer < count:
                    raise UserError(f"layers.{name} names layer {layer}; the source has layers 0 to {count - 1}")
        if not chosen[1]:
            raise UserError("layers.core is empty; name at least one source layer to recur")
    else:
        p, c, d = recipe.sizes or (0, 0, 0)
        if p + c + d > count:
            raise UserError(f"sizes={p},{c},{d} need {p + c + d} layers; the source has {count}")
        chosen = [list(range(p)), list(range(count - d - c, count - d)), list(range(count - d, count))]
    parents = {
        name: [[layer] for layer in layers] for name, layers in zip(("prelude", "core", "coda"), chosen, strict=True)
    }
    return *chosen, parents
