"""Layers of a source that repeat, as in models made by repeating blocks (RYS, self-merges): equal bit for bit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from ..errors import UserError
from .plan import PARTS, Layers
from .source import SourceWeights


@dataclass(frozen=True)
class Block:
    """Layers from `start` that run `times` times: `width` layers in a cycle, or in `sequence` each of them in a row."""

    start: int
    width: int
    times: int
    sequence: bool = False

    def __str__(self) -> str:
        first, last = self.start, self.start + self.width * self.times - 1
        if self.sequence:
            return f"layers {first} to {last} are {self.width} layers, each {self.times} times in a row"
        block = f"layers {first} to {first + self.width - 1}" if self.width > 1 else f"layer {first}"
        return f"{block} come{'s' * (self.width == 1)} {self.times} times in a row, up to layer {last}"

    @property
    def saved(self) -> int:
        """The layers that need no weights of their own."""
        return self.width * (self.times - 1)

    def stands_for(self) -> list[list[int]]:
        """The source layer of core layer n at depth d, as `stands_for[d][n]`."""
        at = (1, self.times) if self.sequence else (self.width, 1)
        return [[self.start + d * at[0] + n * at[1] for n in range(self.width)] for d in range(self.times)]

    def layers(self, count: int) -> Layers:
        """The plan's layers for a source of `count` layers."""
        depths = self.stands_for()
        before, after = range(self.start), range(depths[-1][-1] + 1, count)
        parts = {"prelude": list(before), "core": depths[0], "coda": list(after)}
        parents = {name: [[layer] for layer in layers] for name, layers in parts.items()}
        return Layers(parts, parents, depths, "sequence" if self.sequence else "cycle")


def equal_layers(weights: SourceWeights, layers: str, kinds: list[str]) -> list[int]:
    """For every layer, the first one of the same kind whose tensors are all equal to its own, bit for bit.

    layers: the name of the source's layer list, with a dot at its end. One tensor is in memory at a time. The smallest
    are read first, and none of a layer that is known to have no equal: mostly the norms alone.
    """
    same = [kinds.index(kind) for kind in kinds]
    for kind in dict.fromkeys(kinds):
        first = f"{layers}{kinds.index(kind)}."
        names = [name for name in weights.names() if name.startswith(first)]
        for name in sorted(names, key=lambda name: torch.Size(weights.shape(name)).numel()):
            found: dict[tuple[int, str], int] = {}
            for n in [n for n, other in enumerate(kinds) if other == kind and same.count(same[n]) > 1]:
                checksum = _checksum(weights.read(f"{layers}{n}.{name.removeprefix(first)}"))
                same[n] = found.setdefault((same[n], checksum), n)
    return same


def _checksum(tensor: torch.Tensor) -> str:
    """The checksum of a tensor's type and bytes."""
    digest = hashlib.blake2b(str(tensor.dtype).encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_blocks(same: list[int], start: int = 0, end: int | None = None) -> list[Block]:
    """The blocks that repeat among layers `start` to `end`, by `equal_layers`: the one that saves most comes first.

    Of two that save as many layers, the narrower one is taken. Those that follow lie before it or after it.
    """
    end = len(same) if end is None else end
    found: list[Block] = []
    for first in range(start, end):
        for width in range(1, (end - first) // 2 + 1):
            for sequence in (False, True):
                block = Block(first, width, 2, sequence)
                while block.start + block.width * block.times <= end and _repeats(block, same):
                    found.append(block)
                    block = Block(first, width, block.times + 1, sequence)
    if not found:
        return []
    best = max(found, key=lambda block: (block.saved, -block.width, not block.sequence))
    after = best.start + best.width * best.times
    return [best, *find_blocks(same, start, best.start), *find_blocks(same, after, end)]


def _repeats(block: Block, same: list[int]) -> bool:
    """True where every core layer of the block stands for layers that are equal."""
    first, *others = [[same[layer] for layer in layers] for layers in block.stands_for()]
    return all(other == first for other in others)


def to_fold(same: list[int], model_type: str) -> Block:
    """The block that saves most. Raises UserError where none repeats."""
    if blocks := find_blocks(same):
        return blocks[0]
    again = [n for n, first in enumerate(same) if n != first]
    found = f"layers {again} equal earlier ones, but no block comes twice in a row" if again else "no two are equal"
    raise UserError(
        f"method=fold: nothing repeats among the {len(same)} layers of this {model_type} ({found}); "
        "method=recursive ties layers that differ"
    )


def note(same: list[int], folded: Block | None) -> list[str]:
    """A line on the blocks that repeat; none where nothing does. With `folded`, on it and on the equal layers left."""
    if folded is None:
        blocks = "; ".join(map(str, find_blocks(same)))
        return [f"{blocks}; method=fold shares their weights and computes the same"] if blocks else []
    parts = folded.layers(len(same)).parts
    kept = [layer for part in PARTS for layer in parts[part]]
    again = [layer for i, layer in enumerate(kept) if same[layer] in {same[other] for other in kept[:i]}]
    rest = f"; layers {again} equal others, too, and stay: a model has one core" if again else ""
    return [f"{folded}: folded{rest}"]
