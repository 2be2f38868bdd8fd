"""Every block of layers of a model, skipped, repeated, damped, or run in half steps."""

from __future__ import annotations

from collections.abc import Iterator

from .program import Program
from .recipe import Search

# Way -> (R of the block, `recurrence_damping`); a skipped block has none. Half steps: arXiv 2605.23872.
LOOPS: dict[str, tuple[int, float | str]] = {"repeat": (2, 1.0), "damped": (2, 0.5), "half-steps": (2, "1/R")}


def blocks(recipe: Search, count: int) -> Iterator[tuple[str, int, int, Program]]:
    """(way, first layer, size, program) of every block of a model of `count` layers. Blocks of one start follow each
    other: they share the states before it."""
    for first in range(0, count, recipe.stride):
        for size in recipe.sizes:
            if first + size > count:
                continue
            for way in recipe.ways:
                if way != "skip":
                    yield way, first, size, Program.block(count, first, size, *LOOPS[way])
                elif size < count:
                    yield way, first, size, Program.chain((*range(first), *range(first + size, count)))
