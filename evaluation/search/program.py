"""A program: the layers of a plain model that run, in order, and the block of them that recurs."""

from __future__ import annotations

from typing import NamedTuple


class Program(NamedTuple):
    """Layer ids of the source by the parts of a recurrent-depth model, and how the core recurs.

    recurrences: R of the core.   damping: `recurrence_damping` of the config.
    """

    prelude: tuple[int, ...]
    core: tuple[int, ...]
    coda: tuple[int, ...]
    recurrences: int = 1
    damping: float | str = 1.0

    @classmethod
    def chain(cls, layers: tuple[int, ...]) -> Program:
        """The program that runs `layers`, at least one, once each in this order."""
        return cls(layers[:-1], layers[-1:], ())

    @classmethod
    def block(cls, count: int, first: int, size: int, recurrences: int, damping: float | str) -> Program:
        """All `count` layers, of which `size` recur, from layer `first` on."""
        layers = tuple(range(count))
        return cls(layers[:first], layers[first : first + size], layers[first + size :], recurrences, damping)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers in the order in which they run."""
        return self.prelude + self.core * self.recurrences + self.coda

    def looped(self) -> Program:
        """The same layers, with the repetition that saves most layers as the core.

        A chain without a repetition keeps a core of one layer, in its middle. A program that recurs is left as it is.
        """
        if self.recurrences > 1:
            return self
        layers = self.layers
        best = (0, len(layers) // 2, 1, 1)  # (layers saved, first, size, times)
        for size in range(1, len(layers) // 2 + 1):
            for first in range(len(layers) - 2 * size + 1):
                block, times = layers[first : first + size], 1
                while layers[first + times * size : first + (times + 1) * size] == block:
                    times += 1
                best = max(best, (size * (times - 1), first, size, times), key=lambda found: found[0])
        _, first, size, times = best
        return Program(layers[:first], layers[first : first + size], layers[first + size * times :], times)

    def text(self) -> str:
        """The program in words, as `0-11 (12-15) x2 by 1/R 16-29`."""
        parts = [_ranges(self.prelude), f"({_ranges(self.core)})" if self.recurrences > 1 else _ranges(self.core)]
        if self.recurrences > 1:
            parts[1] += f" x{self.recurrences}" + (f" by {self.damping}" if self.damping != 1.0 else "")
        else:
            parts = [_ranges(self.layers)]
        return " ".join(filter(None, [*parts, _ranges(self.coda) if self.recurrences > 1 else ""]))


def _ranges(layers: tuple[int, ...]) -> str:
    """Layer ids with runs joined: `0-3 5 5 6`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
